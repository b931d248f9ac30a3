"""Ranks that mpirun or mpiexec started. Nothing here imports or initialises MPI."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivetrain_toolkit.environments.hosts import first_host, port_of
from drivetrain_toolkit.environments.reading import ADDRESS, LOOPBACK, Reading, facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces.cluster import World

_OPEN: Final = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
# MPICH, Intel MPI and others that start their ranks by Hydra. PMI_RANK alone is no sign of it:
# srun sets that too.
_HYDRA: Final = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
#: What names one start of mpirun, and is the same in all its ranks.
_NAMES: Final = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")


@dataclass(frozen=True, slots=True)
class MPIEnvironment:
    """Ranks of Open MPI, and of MPICH, Intel MPI and others with Hydra.

    MPI tells no address before it is initialised. On one machine none is needed. On several,
    ``MASTER_ADDR`` and ``MASTER_PORT`` are used, which mpirun passes on, or the first host of the
    SLURM job that mpirun runs in, where it starts rank 0.
    """

    name: str = "mpi"
    priority: int = 80

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """Rank and size by MPI's own names; empty where ``jsrun`` set them."""
        if env.get("JSM_NAMESPACE_RANK", "") and env.get("OMPI_COMM_WORLD_RANK", "") == env.get(
            "JSM_NAMESPACE_RANK"
        ):
            return ()
        names = self._names(env)
        return facts(env, names[:2]) if names else ()

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process.

        Raises:
            ClusterError: Variables are missing or contradict each other, or nothing tells where
                rank 0 can be reached.
        """
        names = self._names(env)
        told = (*names, *_NAMES, "SLURM_JOB_ID", "SLURM_JOB_NODELIST", *ADDRESS)
        reading = Reading(self.name, env, facts(env, told))
        if not names:
            raise reading.error(
                "no rank of Open MPI, MPICH or Intel MPI is set",
                "Start the program with mpirun or mpiexec.",
            )
        place = reading.place(names)
        reading.agree(place)
        if place.size == 1:
            return reading.world(place, "", 0)
        alone = place.local_size == place.size
        return reading.world(
            place,
            self._address(reading, alone=alone),
            self._port(reading, alone=alone),
            job=next((env[name] for name in _NAMES if env.get(name, "")), ""),
        )

    def _names(self, env: Mapping[str, str]) -> tuple[str, ...]:
        if env.get(_OPEN[0], "") and env.get(_OPEN[1], ""):
            return _OPEN
        if all(env.get(name, "") for name in (_HYDRA[0], _HYDRA[1], _HYDRA[2])):
            return _HYDRA
        return ()

    def _address(self, reading: Reading, *, alone: bool) -> str:
        if reading.env.get("MASTER_ADDR", ""):
            return reading.address()
        if alone:
            return LOOPBACK
        hosts = reading.env.get("SLURM_JOB_NODELIST", "")
        if hosts:
            try:
                return first_host(hosts)
            except ValueError as error:
                raise reading.error(
                    f"SLURM_JOB_NODELIST={hosts} cannot be read: {error}",
                    "Set MASTER_ADDR to the host of rank 0.",
                ) from error
        raise reading.error(
            "its ranks are on several machines, and nothing tells where rank 0 is",
            "Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, and have "
            "mpirun pass them on (-x with Open MPI, -genvlist with MPICH and Intel MPI).",
        )

    def _port(self, reading: Reading, *, alone: bool) -> int:
        if reading.env.get("MASTER_PORT", ""):
            return reading.port()
        for name in _NAMES:
            told = reading.env.get(name, "")
            if told:
                return port_of(zlib.crc32(told.encode()))
        job = reading.env.get("SLURM_JOB_ID", "")
        if job.isdigit():
            return port_of(int(job))
        proxy = _hydra_proxy() if alone else 0
        if proxy:
            return port_of(proxy)
        raise reading.error(
            "nothing tells a port at which the ranks could meet",
            "Set MASTER_PORT to a free port of rank 0's machine, and have mpirun pass it on "
            "(-genvlist MASTER_PORT with MPICH and Intel MPI).",
        )


def _hydra_proxy() -> int:
    """The process of Hydra that started this one, which is the same for all ranks of a machine.

    Hydra names its runs in no variable; 0 where there is no such process or no ``/proc``.
    """
    process = os.getpid()
    while process > 1:
        try:
            text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return 0
        if "(hydra_" in text:  # the name is cut after 15 letters
            return process
        process = int(text.rpartition(")")[2].split()[1])
    return 0


MPI: Final = MPIEnvironment()
