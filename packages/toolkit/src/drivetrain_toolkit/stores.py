"""What checkpoints need of the place they are kept in, whether a file system or an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from drivetrain_toolkit.tensorfile import Readable

    Fill = Callable[[Callable[[Any], None]], None]


class Source(Protocol):
    """A directory that is read. What it was when it was opened, or an error, whatever happens."""

    @property
    def path(self) -> str:
        """What messages call it."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes by name."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a file that the manifest does not name is a sign of damage."""
        ...

    def open(self, name: str) -> AbstractContextManager[Readable]:
        """A file from its beginning."""
        ...

    def replaced(self) -> bool:
        """Whether another directory has its name by now."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Draft(Protocol):
    """A directory that is written, and that nobody sees as a checkpoint yet."""

    def name(self, wanted: str) -> str:
        """What a file is going to be called."""
        ...

    def write(self, name: str, fill: Fill, size: int = 0) -> tuple[int, str]:
        """Write a file durably; returns its size and the XXH3 hash of what was written.

        ``size`` is about how many bytes are going to come, where that is known.
        """
        ...

    def publish(self, manifest: bytes) -> None:
        """Write the manifest, and give the directory its name, in one step."""
        ...

    def abandon(self) -> None:
        """Delete it. Never raises."""
        ...

    @property
    def longest_nap(self) -> float:
        """Seconds between two looks at the notes."""
        ...

    # What several writers tell each other
    def tell(self, name: str, data: bytes) -> None:
        """Leave a note for the others; it appears as a whole."""
        ...

    def notes(self) -> Mapping[str, int]:
        """Sizes of notes, and of whatever else shows progress. Empty once it is gone."""
        ...

    def note(self, name: str) -> bytes:
        """What a note says."""
        ...


class Store(Protocol):
    """A place where checkpoints are kept."""

    def open(self, path: str) -> Source:
        """Raises ``CheckpointError`` if there is no directory."""
        ...

    def begin(self, path: str, token: str) -> Draft:
        """A new draft of ``path``. Raises ``CheckpointError`` if that is something else."""
        ...

    def join(self, path: str, token: str) -> Draft | None:
        """The draft that another process has begun, or None if it has not yet."""
        ...

    def remove(self, path: str) -> None:
        """Delete a checkpoint. Missing is not an error."""
        ...

    def candidates(self, directory: str) -> Sequence[str]:
        """Paths in a directory that may be checkpoints."""
        ...
