"""Bytes: how a tree of tensors and plain values becomes durable, and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch


@runtime_checkable
class CheckpointIO(Protocol):
    """Writes and reads whole checkpoints. Called on rank 0 for ``save`` and ``remove``.

    A tree is nested mappings (with string keys) and sequences of tensors and values that the
    format's codecs know. A checkpoint exists completely or does not.
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


@runtime_checkable
class SupportsVerify(Protocol):
    """A checkpoint IO that can tell what is damaged, without loading."""

    def verify(self, path: str) -> Sequence[str]:
        """What is wrong, one line each; nothing if it is complete and as it was written."""
        ...


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a checkpoint says about one tensor: its whole shape, and the files with its parts."""

    dtype: str
    shape: tuple[int, ...]
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a checkpoint says about itself.

    Attributes:
        path: Where it is.
        form: ``"directory"``, or that of a single file (``SupportsConvert``).
        version: Of the format.
        contract: The contract that its writer was written for; empty if it does not say.
        producer: What wrote it; empty if it does not say.
        created: Time of saving, UTC, ISO 8601; empty if it does not say.
        world_size: Processes of the run that wrote it, if it says.
        files: Sizes in bytes by name.
        tensors: By name, which is the tensor's place in the tree.
        values: Everything else: plain values by place, such as ``"loop/global_step"``.
    """

    path: str
    form: str
    version: int | None = None
    contract: str = ""
    producer: str = ""
    created: str = ""
    world_size: int | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """One place at which two checkpoints differ.

    Attributes:
        place: Where in the tree.
        kind: ``"first only"``, ``"second only"``, ``"dtype"``, ``"shape"`` or ``"value"``.
        detail: In words.
    """

    place: str
    kind: str
    detail: str = ""


@runtime_checkable
class SupportsInspect(Protocol):
    """A checkpoint IO that can describe and compare checkpoints."""

    def inspect(self, path: str) -> CheckpointFacts:
        """What it says about itself. Raises as ``load``."""
        ...

    def diff(self, first: str, second: str) -> Sequence[Difference]:
        """Where two differ, in the order of places; nothing if they hold the same."""
        ...


@dataclass(frozen=True, slots=True)
class Refused:
    """In a tree of a foreign file: a value that only its own code could make.

    Attributes:
        kind: The class or function, as the file names it.
        items: What it contained, if it was a mapping and nothing else is known of it.
    """

    kind: str
    items: dict[Any, Any] | None = None


@runtime_checkable
class SupportsConvert(Protocol):
    """A checkpoint IO that knows single files too.

    Forms: ``"directory"`` (its own, consolidated: one file of tensors whoever wrote it),
    ``"torch"`` (one file for ``torch.load(weights_only=True)``) and ``"safetensors"`` (weights
    alone, by the names of the module's ``state_dict``).
    """

    def convert(self, source: str, target: str, form: str) -> Sequence[str]:
        """Write what is at ``source`` to ``target`` in another form.

        Returns:
            What the form cannot hold and was left out, one place each.

        Raises:
            CheckpointError: The source is damaged, or the target exists already.
        """
        ...

    def read_file(self, path: str) -> dict[str, Any]:
        """The tree of a file of ``torch.save`` or of safetensors; any layout of keys.

        Runs no code from it: a ``Refused`` is in place of whatever is not plain data.
        """
        ...


@runtime_checkable
class SupportsPrune(Protocol):
    """A checkpoint IO that can tidy a directory."""

    def prune(self, directory: str, keep: int) -> Sequence[str]:
        """Remove all but the ``keep`` newest; returns the paths of what went.

        Nothing is removed unless as many newer ones are complete and verified.
        """
        ...


@runtime_checkable
class PendingSave(Protocol):
    """A save that goes on while training does."""

    def done(self) -> bool:
        """Whether it has ended, well or not. Cheap enough for every step."""
        ...

    def wait(self) -> None:
        """Return once it is durable. Raises what went wrong, every time it is called."""
        ...


@dataclass(frozen=True, slots=True)
class SaveGroup:
    """The processes that write one checkpoint together, each its own files.

    They find each other by ``token`` in the directory that they write to, and need nothing else.

    Attributes:
        rank: Of this process.
        size: How many there are.
        token: Letters and digits that all of them agreed on for this one save.
        timeout: Seconds without progress after which those that are missing are given up.
        check: Called again and again while this process waits; raises if others have ended.
    """

    rank: int
    size: int
    token: str
    timeout: float = 600.0
    check: Callable[[], None] | None = None


@runtime_checkable
class SupportsBackgroundSave(Protocol):
    """A checkpoint IO that copies a tree and writes it while training goes on."""

    def begin_save(
        self,
        tree: Mapping[str, Any],
        path: str,
        *,
        staged: bool = False,
        group: SaveGroup | None = None,
    ) -> PendingSave:
        """Take a copy of ``tree``, and return while it is being written.

        Waits for a save under way first, and raises what went wrong there. The process does not end
        before the save has.

        Args:
            tree: What to save.
            path: Where to.
            staged: Whether the tensors belong to the save already, such as those of
                ``Strategy.state()``: then nothing is copied.
            group: The processes that save together (``SupportsShardedSave``); None for one alone.

        Raises:
            CheckpointError: A value cannot be held; nothing is written.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The part of a partitioned tensor that this process holds, in place of the tensor in a tree.

    Attributes:
        data: The part. May be empty.
        start: Where it begins in the whole, one number per dimension.
        shape: Of the whole.
    """

    data: torch.Tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]


@runtime_checkable
class SupportsShardedSave(Protocol):
    """A checkpoint IO in which every process writes what it holds, and nothing is gathered."""

    def save_sharded(self, tree: Mapping[str, Any], path: str, group: SaveGroup) -> None:
        """Write this process's part; return once all are durable. Every process calls it.

        The trees of all processes are laid over each other: mappings key by key. Where several have
        a value at the same place, that of the lowest rank is kept; shards become one tensor. What
        goes wrong in one process is raised in all of them.

        Raises:
            CheckpointError: Shards do not make up their tensor, or a process failed or is missing.
            StorageError: Files cannot be written.
        """
        ...


@runtime_checkable
class StoredTensor(Protocol):
    """A tensor of a checkpoint that is read when somebody asks, and as much as they ask for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of its items."""
        ...

    def read(
        self, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A box of it on the host, by default all: where it begins, and how large it is."""
        ...


@runtime_checkable
class SupportsShardedLoad(Protocol):
    """A checkpoint IO that need not read the whole state into every process."""

    def open(self, path: str) -> dict[str, Any]:
        """As ``load``, with a ``StoredTensor``, verified when it is read, for each tensor."""
        ...
