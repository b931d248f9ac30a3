"""Who am I among the processes of the run: a value, read once from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class World:
    """Where this process stands among all processes of the run.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine, from 0.
        local_size: Number of processes on this machine.
        node_rank: Number of this machine, from 0.
        address: Host at which rank 0 can be reached; empty when there is one process.
        port: TCP port at that host; 0 when there is one process.
        restarts: How often the run was restarted by whoever manages it.
        environment: Name of the cluster environment that this was read from.
        evidence: The facts it was read from, such as ``("RANK=1", "WORLD_SIZE=2")``.
        num_nodes: Number of machines; 0 where it only follows from the numbers of processes.
        max_restarts: How often the manager may start the run again; 0 if it does not say.
        job: What the manager calls the run, as its own commands take it; empty if it does not say.
        devices_apart: Whether the manager gave each process devices of its own, so that processes
            of one machine see different ones, all numbered from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    address: str = ""
    port: int = 0
    restarts: int = 0
    environment: str = "local"
    evidence: tuple[str, ...] = ()
    num_nodes: int = 0
    max_restarts: int = 0
    job: str = ""
    devices_apart: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.size}")
        if not 0 <= self.local_rank < self.local_size <= self.size:
            raise ValueError(
                f"local rank {self.local_rank} of {self.local_size} does not fit into "
                f"a world of {self.size}"
            )
        if self.size > 1 and not (self.address and self.port):
            raise ValueError("a world of several processes needs an address and a port")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes: rank 0."""
        return self.rank == 0

    @property
    def machines(self) -> int:
        """Number of machines, told or counted from processes: as many on each as on this one."""
        return self.num_nodes or -(-self.size // self.local_size)


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a run, as a manager describes them that starts one process on each.

    Launchers then start the ranks.

    Attributes:
        num_nodes: Number of machines.
        node_rank: Number of this machine, from 0.
        local_size: Number of processes to start on each; 0 for one on each device.
        address: Host of machine 0.
        port: TCP port there.
        environment: Name of the cluster environment that this was read from.
        evidence: The facts it was read from.
    """

    num_nodes: int = 1
    node_rank: int = 0
    local_size: int = 0
    address: str = ""
    port: int = 0
    environment: str = ""
    evidence: tuple[str, ...] = ()


@runtime_checkable
class ClusterEnvironment(Protocol):
    """Reads one kind of cluster from a mapping of variables. Changes nothing, imports nothing."""

    @property
    def name(self) -> str:
        """The name users and records call it by, such as ``"torchrun"``."""
        ...

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The evidence that some manager started this process; empty when there is none."""
        ...

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process. Raises ``ClusterError`` where variables contradict."""
        ...


#: The priority of an environment that states none: after those that start ranks inside of jobs.
USUAL_PRIORITY = 50


@runtime_checkable
class StatesPriority(Protocol):
    """An environment that says who goes first where several have evidence."""

    @property
    def priority(self) -> int:
        """Higher goes first. What runs inside another manager's job is above that manager."""
        ...


@runtime_checkable
class DescribesMachines(Protocol):
    """An environment whose manager may start one process on each machine, which is no rank yet."""

    def machines(self, env: Mapping[str, str]) -> Machines | None:
        """The machines; None where this process is a rank already or nothing is known.

        Raises ``ClusterError`` where variables contradict.
        """
        ...


@runtime_checkable
class Remarks(Protocol):
    """An environment that knows what users of its manager should be told."""

    def remarks(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """Sentences for the user, each with what to do; empty where all is well."""
        ...


def priority_of(environment: object) -> int:
    """The priority of an environment, ``USUAL_PRIORITY`` where it states none."""
    return environment.priority if isinstance(environment, StatesPriority) else USUAL_PRIORITY


@runtime_checkable
class JobManager(Protocol):
    """Whoever owns the job that this process belongs to, and can be asked to run it again.

    Not the same as the environment that numbers the ranks: torchrun does that inside a batch job,
    and the job is still its scheduler's.
    """

    @property
    def name(self) -> str:
        """The name users and records call it by, such as ``"slurm"``."""
        ...

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The evidence that this process belongs to a job of it; empty when there is none."""
        ...

    def requeue(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The command that makes this very job run again. Runs nothing."""
        ...
