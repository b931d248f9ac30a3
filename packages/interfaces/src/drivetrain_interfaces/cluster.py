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
