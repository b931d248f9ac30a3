"""Bytes: how a tree of tensors and plain values becomes durable, and comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@runtime_checkable
class CheckpointIO(Protocol):
    """Writes and reads whole checkpoints. Called on rank 0 for ``save`` and ``remove``.

    A tree is nested mappings (with string keys) and sequences of tensors and values that the
    format's codecs know. A checkpoint exists completely or it does not exist.
    """

    def save(self, tree: Mapping[str, Any], path: str) -> None:
        """Write ``tree``; return once durable. Raises ``CheckpointError`` or ``StorageError``."""
        ...

    def load(self, path: str) -> dict[str, Any]:
        """Read it back with tensors on the host. Runs no code from the file."""
        ...

    def exists(self, path: str) -> bool:
        """Whether a complete checkpoint is there."""
        ...

    def remove(self, path: str) -> None:
        """Delete it. Missing is not an error."""
        ...


@runtime_checkable
class SupportsListing(Protocol):
    """A checkpoint IO that can name what is in a directory."""

    def list(self, directory: str) -> Sequence[str]:
        """Paths of complete checkpoints, the newest first."""
        ...
