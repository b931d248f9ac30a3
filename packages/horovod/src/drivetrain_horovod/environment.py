"""Processes that ``horovodrun`` started: their places, read from its variables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import ClusterError, World

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEEDED: Final = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_RANK",
    "HOROVOD_LOCAL_SIZE",
    "HOROVOD_CROSS_RANK",
)
_LOWEST, _PORTS = 10_000, 50_000


class HorovodEnvironment:
    """``horovodrun``. It satisfies ``ClusterEnvironment``.

    Horovod has no port for torch's own collectives; ``MASTER_PORT`` says one, and without it one is
    derived from the port of Horovod's rendezvous, which is equal on all ranks.
    """

    name = "horovod"

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The variables of ``horovodrun`` that say how many ranks there are, and which this is."""
        names = _NEEDED[:2]
        return tuple(f"{n}={env[n]}" for n in names) if env.keys() >= set(names) else ()

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process. Raises ``ClusterError`` for variables that make no world."""
        try:
            rank, size, local_rank, local_size, cross = (int(env[name]) for name in _NEEDED)
            address, port = "", 0
            if size > 1:
                address = env.get("MASTER_ADDR") or env["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
                port = int(env.get("MASTER_PORT") or _derived(env))
            return World(
                rank=rank,
                size=size,
                local_rank=local_rank,
                local_size=local_size,
                node_rank=cross,
                address=address,
                port=port,
                environment=self.name,
                evidence=tuple(f"{name}={env[name]}" for name in _NEEDED),
            )
        except KeyError as error:
            raise ClusterError(
                f"Horovod's variables were found, and {error.args[0]} is missing.",
                "Start the processes with horovodrun --gloo.",
            ) from error
        except ValueError as error:
            raise ClusterError(
                f"Horovod's variables make no world: {error}.",
                "Start the processes with horovodrun --gloo.",
            ) from error


def _derived(env: Mapping[str, str]) -> int:
    return _LOWEST + (int(env["HOROVOD_GLOO_RENDEZVOUS_PORT"]) * 7 + 1) % _PORTS


HOROVOD = HorovodEnvironment()
