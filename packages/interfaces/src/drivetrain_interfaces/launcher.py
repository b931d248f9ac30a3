"""Starting processes. Chosen independently of the strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces.cluster import World


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What is to be started: ``local_size`` processes on each of ``num_nodes`` machines."""

    local_size: int = 1
    num_nodes: int = 1
    node_rank: int = 0
    address: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What a launcher is going to do, as data that can be printed.

    Attributes:
        launcher: Name of the launcher.
        worlds: The place of each process that this launcher starts on this machine.
        command: The command that each process runs, where there is one.
        environment: Variables that each process gets besides those of its place.
    """

    launcher: str
    worlds: tuple[World, ...]
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@runtime_checkable
class Launcher(Protocol):
    """Starts the processes of a run, watches them, and ends all of them when one fails."""

    @property
    def interactive(self) -> bool:
        """Whether it works from a notebook or a prompt, where there is no script to run again."""
        ...

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """What ``launch`` would do. Starts nothing; raises ``ClusterError`` if it cannot be."""
        ...

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Run ``main`` in every process; returns this process's result, or that of rank 0.

        Raises:
            ProcessFailedError: A process failed; the message is the first failure's. All
                processes have ended by then.
        """
        ...


@runtime_checkable
class RunsInPlace(Protocol):
    """A launcher whose rank 0 is the calling process, so that objects there keep their state."""

    @property
    def in_place(self) -> bool:
        """Whether ``main`` of rank 0 runs in the calling process."""
        ...
