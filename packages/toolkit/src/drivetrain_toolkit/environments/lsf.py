"""Tasks that ``jsrun`` started in an LSF job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivetrain_toolkit.environments.hosts import port_of, same_host
from drivetrain_toolkit.environments.reading import ADDRESS, LOOPBACK, Place, Reading, facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces.cluster import World

_TASK: Final = (
    "JSM_NAMESPACE_RANK",
    "JSM_NAMESPACE_SIZE",
    "JSM_NAMESPACE_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_SIZE",
)
_JOB: Final = ("LSB_JOBID", "LSB_JOBINDEX", "LSB_RESTART")
_HOSTS: Final = ("LSB_DJOB_RANKFILE", "LSB_DJOB_HOSTFILE", "LSB_MCPU_HOSTS", "LSB_HOSTS")


@dataclass(frozen=True, slots=True)
class LSFEnvironment:
    """Tasks of ``jsrun`` in a job of LSF; rank 0 is on the first host after the launch node.

    ``bsub`` alone makes no ranks: the script runs once. Under LSF's integration of mpirun the
    ranks are MPI's.
    """

    name: str = "lsf"
    priority: int = 85

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The job, and this task's place by ``jsrun``; empty for a single task."""
        if not env.get("LSB_JOBID", "") or not env.get(_TASK[0], ""):
            return ()
        if env.get(_TASK[1], "") in {"", "0", "1"}:
            return ()
        return facts(env, ("LSB_JOBID", *_TASK[:2]))

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this task. Reads the rank file of the job, where there is one.

        Raises:
            ClusterError: Variables are missing or contradict each other, or the hosts are unknown.
        """
        reading = Reading(self.name, env, facts(env, (*_JOB, *_TASK, *_HOSTS, *ADDRESS)))
        if not self.detect(env):
            raise reading.error(
                "this process is no task of a jsrun with several tasks",
                "Start the program with jsrun, inside a job of LSF.",
            )
        place = reading.place(_TASK)
        alone = place.local_size == place.size
        hosts = () if alone else compute_hosts(reading)
        own = env.get("HOSTNAME", "") or os.uname().nodename
        numbers = [number for number, host in enumerate(hosts) if same_host(host, own)]
        if numbers:
            place = Place(place.rank, place.size, place.local_rank, place.local_size, numbers[0])
        reading.agree(place)
        return reading.world(
            place,
            self._address(reading, hosts, alone=alone),
            self._port(reading),
            restarts=int(env.get("LSB_RESTART", "") == "Y"),
            job=job_name(env),
        )

    def remarks(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """That this process has a job of several slots to itself, where it has."""
        job, slots = env.get("LSB_JOBID", ""), env.get("LSB_DJOB_NUMPROC", "1")
        others = ("JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
        if not job or slots in {"", "1"} or any(env.get(name, "") for name in others):
            return ()
        remark = (
            f"LSF job {job} is larger than this process (LSB_DJOB_NUMPROC={slots}), and jsrun did "
            "not start it: nobody else is waited for. Start the program with jsrun or mpirun to "
            "use all of the job."
        )
        return (remark,)

    def _address(self, reading: Reading, hosts: tuple[str, ...], *, alone: bool) -> str:
        if reading.env.get("MASTER_ADDR", ""):
            return reading.address()
        if alone:
            return LOOPBACK
        if not hosts:
            raise reading.error(
                f"none of {', '.join(_HOSTS)} names the hosts of the job",
                "Set MASTER_ADDR to the host of rank 0.",
            )
        return hosts[0]

    def _port(self, reading: Reading) -> int:
        if reading.env.get("MASTER_PORT", ""):
            return reading.port()
        index = reading.number("LSB_JOBINDEX", default=0)
        return port_of(reading.number("LSB_JOBID"), index)


def job_name(env: Mapping[str, str]) -> str:
    """The job as ``bkill`` and ``brequeue`` take it: ``7``, or ``7[2]`` for an array's element."""
    index = env.get("LSB_JOBINDEX", "")
    return f"{env.get('LSB_JOBID', '')}[{index}]" if index not in {"", "0"} else env["LSB_JOBID"]


def compute_hosts(reading: Reading) -> tuple[str, ...]:
    """The hosts on which tasks run, each once, in order, without the node that launches.

    The launch node comes first and has one slot; so the first host goes where it is listed once
    and others follow.

    Raises:
        ClusterError: The rank file cannot be read.
    """
    slots = _slots(reading)
    if len(set(slots)) > 1 and slots.count(slots[0]) == 1:
        slots = slots[1:]
    return tuple(dict.fromkeys(slots))


def _slots(reading: Reading) -> list[str]:
    """One host for each slot."""
    for name in _HOSTS[:2]:
        path = reading.env.get(name, "")
        if path:
            try:
                return Path(path).read_text(encoding="utf-8").split()
            except OSError as error:
                raise reading.error(
                    f"{name}={path} cannot be read: {error}",
                    "Make the file readable on every host of the job, or unset the variable.",
                ) from error
    pairs = reading.env.get("LSB_MCPU_HOSTS", "").split()
    if pairs:
        counts = (int(count) if count.isdigit() else 1 for count in pairs[1::2])
        return [host for host, count in zip(pairs[::2], counts) for _ in range(count)]  # noqa: B905 - a cut list still tells the first hosts
    return reading.env.get("LSB_HOSTS", "").split()


LSF: Final = LSFEnvironment()
