"""Writing the file of a batch job, as a person would have done it by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job is to be, in words that all managers have.

    Attributes:
        command: What each process runs.
        name: What the manager calls the job.
        nodes: Number of machines.
        processes: Number of processes on each machine.
        devices: Number of accelerator devices on each machine; 0 for none.
        cpus: Number of cores for each process; 0 leaves it to the manager.
        memory: Memory of each machine, as the manager writes it; empty leaves it to the manager.
        time: Longest time as ``HH:MM:SS``; empty leaves it to the manager.
        setup: Lines of shell that run first on the machine that starts the others.
        options: Further options for the manager, as it writes them.
    """

    command: tuple[str, ...]
    name: str = "drivetrain"
    nodes: int = 1
    processes: int = 1
    devices: int = 0
    cpus: int = 0
    memory: str = ""
    time: str = ""
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobFile:
    """The file of a job.

    Attributes:
        text: What is in it.
        suffix: What its name ends with, such as ``".sh"``.
    """

    text: str
    suffix: str


@runtime_checkable
class Submitter(Protocol):
    """Writes job files for one manager. What the group ``drivetrain.submitters`` registers."""

    @property
    def name(self) -> str:
        """The name users call it by, such as ``"slurm"``."""
        ...

    def write(self, job: JobRequest) -> JobFile:
        """The file for a job. Raises ``ConfigurationError`` for what the manager cannot do."""
        ...

    def command(self, path: str) -> tuple[str, ...]:
        """The command that submits the file at ``path``."""
        ...
