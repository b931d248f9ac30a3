"""Tensors of a checkpoint that are read when somebody asks, and as much as they ask for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_named
from drivetrain_toolkit.manifest import damaged
from drivetrain_toolkit.reading import box, content_problem, slots_of
from drivetrain_toolkit.tensorfile import BadFileError, fill, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from drivetrain_toolkit.manifest import Manifest, ShardEntry, TensorFacts
    from drivetrain_toolkit.stores import Source
    from drivetrain_toolkit.tensorfile import Readable, Slot


class LazyTensor:
    """A tensor that stays in its files."""

    def __init__(self, name: str, facts: TensorFacts, files: _Files) -> None:
        self._name = name
        self._facts = facts
        self._files = files

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self._facts.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of its items."""
        return dtype_named(self._facts.dtype)

    def read(
        self, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A box of it on the host, by default all.

        Raises:
            CheckpointError: The box leaves the tensor, or a file is damaged.
            StorageError: A file cannot be read.
        """
        first = (0,) * len(self.shape) if start is None else tuple(start)
        extent = self.shape if shape is None else tuple(shape)
        if len(first) != len(self.shape) or len(extent) != len(self.shape):
            raise self._outside(first, extent)
        if any(
            s < 0 or e < 0 or s + e > w for s, e, w in zip(first, extent, self.shape, strict=True)
        ):
            raise self._outside(first, extent)
        result = torch.empty(extent, dtype=self.dtype)
        for shard in self._facts.shards:
            self._copy_common(shard, first, result)
        return result

    def __repr__(self) -> str:
        return f"LazyTensor({self._name!r}, {self._facts.dtype}, {self.shape})"

    def _copy_common(self, shard: ShardEntry, first: tuple[int, ...], result: torch.Tensor) -> None:
        """Copy what ``shard`` and the box ``result`` at ``first`` have in common."""
        low = tuple(map(max, shard.start, first))
        ends = zip(shard.start, shard.shape, first, result.shape, strict=True)
        high = tuple(min(s + e, f + r) for s, e, f, r in ends)
        size = _minus(high, low)
        if any(each <= 0 for each in size):
            return
        target = box(result, _minus(low, first), size)
        inner = _minus(low, shard.start)
        # Whole rows of the first dimension lie together in the file; the rest is cut in memory.
        rows = (size[0], *shard.shape[1:]) if size else ()
        skip = inner[0] * _items(shard.shape[1:]) * result.element_size() if size else 0
        if rows == size and target.is_contiguous():
            self._files.read(shard, skip, target)
            return
        piece = torch.empty(rows, dtype=result.dtype)
        self._files.read(shard, skip, piece)
        target.copy_(box(piece, (0, *inner[1:]) if size else (), size))

    def _outside(self, start: tuple[int, ...], shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"A box of {shape} at {start} was to be read from {self._name!r}, which has the shape "
            f"{self.shape}.",
            "Ask for a part of it.",
        )


def lazy_tensors(
    source: Source,
    manifest: Manifest,
    reading: Callable[[], AbstractContextManager[None]],
) -> dict[str, LazyTensor]:
    """A lazy tensor for each of a checkpoint.

    Args:
        source: Stays open as long as they are used.
        manifest: What it says.
        reading: A context that gives errors of the system their name.
    """
    files = _Files(source, manifest, reading)
    return {name: LazyTensor(name, facts, files) for name, facts in manifest.tensors.items()}


class _Files:
    """The files of one checkpoint, each verified before the first read from it."""

    def __init__(
        self,
        source: Source,
        manifest: Manifest,
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._reading = reading
        self._slots: dict[str, dict[str, tuple[int, Slot]]] = {}

    def read(self, shard: ShardEntry, skip: int, into: torch.Tensor) -> None:
        """Fill a contiguous tensor from a shard, after its first ``skip`` bytes."""
        with self._reading():
            offset, _ = self._verified(shard.file)[shard.key]
            with self._file(shard.file) as file:
                file.seek(offset + skip)
                for piece in pieces(into):
                    fill(file, piece)

    def _verified(self, name: str) -> dict[str, tuple[int, Slot]]:
        if name not in self._slots:
            if how := content_problem(self._source, self._manifest, name):
                raise damaged(self._source.path, name, how)
            self._slots[name] = slots_of(self._source, self._manifest, name)
        return self._slots[name]

    @contextmanager
    def _file(self, name: str) -> Iterator[Readable]:
        try:
            with self._source.open(name) as file:
                yield file
        except BadFileError as error:
            raise damaged(self._source.path, name, str(error)) from error


def _minus(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(first, second, strict=True))


def _items(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
