"""Processes that ``poprun`` started: their places, read from its variables."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import ClusterError, World

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOTAL, _LOCAL = "POPDIST_NUM_TOTAL_REPLICAS", "POPDIST_NUM_LOCAL_REPLICAS"
_OFFSET, _PLACE = "POPDIST_REPLICA_INDEX_OFFSET", "POPDIST_LOCAL_INSTANCE_INDEX"
_NEEDED: Final = (_TOTAL, _LOCAL, _OFFSET, _PLACE)
_HOSTED: Final = "OMPI_COMM_WORLD_LOCAL_SIZE"
_JOBS: Final = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
_LOWEST, _PORTS = 10_000, 50_000
_AGAIN = "Start the processes with poprun, with equally many replicas in each."


class PopdistEnvironment:
    """``poprun``. It satisfies ``ClusterEnvironment``.

    It is not recognized by the variables of MPI, which any ``mpirun`` sets. Between hosts there is
    no address among its variables; then ``MASTER_ADDR`` and ``MASTER_PORT`` say one.
    """

    name = "popdist"
    #: ``poprun`` starts ``mpirun``, in jobs of batch systems: it goes before both.
    priority = 88

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The variables of ``poprun``, if they are there."""
        return tuple(f"{name}={env[name]}" for name in _NEEDED if name in env)

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process. Raises ``ClusterError`` for variables that make no world."""
        try:
            total, local, offset, place = (int(env[name]) for name in _NEEDED)
            if local < 1 or total % local or offset % local:
                raise ClusterError(
                    f"poprun's variables say {local} of {total} replicas from number {offset}, "
                    "which makes no equal instances.",
                    _AGAIN,
                )
            size = total // local
            hosted = int(env.get(_HOSTED, size))
            address, port = ("", 0) if size == 1 else _meeting(env, one_host=hosted == size)
            return World(
                rank=offset // local,
                size=size,
                local_rank=place,
                local_size=hosted,
                node_rank=(offset // local) // hosted,
                address=address,
                port=port,
                environment=self.name,
                evidence=self.detect(env),
                devices_apart=True,
            )
        except KeyError as error:
            raise ClusterError(
                f"Variables of poprun were found, and {error.args[0]} is missing.", _AGAIN
            ) from error
        except ValueError as error:
            if isinstance(error, ClusterError):
                raise
            raise ClusterError(f"poprun's variables make no world: {error}.", _AGAIN) from error


def _meeting(env: Mapping[str, str], *, one_host: bool) -> tuple[str, int]:
    """Where hosts meet: said, or on one host a port that is equal in all processes of a job."""
    if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        return env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if not one_host:
        raise ClusterError(
            "poprun started processes on several hosts, and no variable says where they meet.",
            "Pass it on: poprun --mpi-global-args='-x MASTER_ADDR=HOST -x MASTER_PORT=PORT'.",
        )
    job = next((env[name] for name in _JOBS if env.get(name)), "")
    return "127.0.0.1", _LOWEST + zlib.crc32(job.encode()) % _PORTS


POPDIST = PopdistEnvironment()
