"""Batches as rows: how many there are, some of them, and those of several ranks together."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from drivetrain_interfaces import DataError
from torch import Tensor

from drivetrain_toolkit.trees import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from drivetrain_interfaces import StepResult
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from drivetrain_toolkit.steps import EagerTrainStep

# Newer torch warns of the older name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Bytes before the rows of a message, and the step in which tensors begin in it.
_HEADER = 16


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def look(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            found.append(value)
        return value

    mapped(batch, look)
    return found


def count_rows(batch: Any, owner: str) -> int:
    """The length of the first dimension of a batch's tensors.

    Raises:
        DataError: They have none, or several lengths.
    """
    return _common_length(_tensors(batch), owner)


def _common_length(tensors: Sequence[Tensor], owner: str) -> int:
    lengths = {tensor.shape[0] for tensor in tensors}
    if len(lengths) != 1:
        raise DataError(
            f"The strategy {owner!r} divides batches by rows, and the tensors of this one have "
            f"{sorted(lengths) or 'no'} rows.",
            "Let the first dimension of every tensor be the samples.",
        )
    return lengths.pop()


def shapes_of(batch: Any) -> tuple[torch.Size, ...]:
    """The shapes of a batch's tensors, in an order that depends on its form alone."""
    return tuple(tensor.shape for tensor in _tensors(batch))


def some_rows(batch: Any, first: int, last: int) -> Any:
    """The rows from ``first`` up to ``last`` of every tensor; the rest as it is."""

    def cut(value: Any) -> Any:
        return value[first:last] if isinstance(value, Tensor) and value.dim() else value

    return mapped(batch, cut)


def divided(rows: int, parts: int) -> list[tuple[int, int]]:
    """The bounds of at most ``parts`` parts, none of them empty, that differ by one row at most."""
    parts = max(1, min(parts, rows))
    bounds = [number * rows // parts for number in range(parts + 1)]
    return list(pairwise(bounds))


class Gathered:
    """Batches of the ranks of a group as one, in the order of the ranks.

    Args:
        group: The ranks; None means all.
        owner: Name of the strategy, for messages.
    """

    def __init__(self, group: ProcessGroup | None, owner: str) -> None:
        self._group = group
        self._owner = owner
        self.rank = dist.get_rank(group)
        self.counts: list[int] = []
        self._room = 0  # rows that a message has room for; the same on all ranks

    @property
    def bounds(self) -> tuple[int, int]:
        """This rank's rows in the batch that was gathered last."""
        first = sum(self.counts[: self.rank])
        return first, first + self.counts[self.rank]

    def __call__(self, batch: Any) -> Any:
        """The rows of all ranks. Every rank of the group calls it.

        All of a batch travels as one message, with the number of its rows at the front. It has room
        for as many rows as the longest batch so far had on any rank; where one is longer still, all
        ranks see that, and send again.
        """
        tensors = [tensor.detach() for tensor in _tensors(batch)]
        rows = _common_length(tensors, self._owner)
        parts = self._exchange(tensors, rows)
        if max(self.counts) > self._room:
            self._room = max(self.counts)
            parts = self._exchange(tensors, rows)
        whole = (torch.cat(found) for found in zip(*parts, strict=True))

        def gather(value: Any) -> Any:
            return next(whole) if isinstance(value, Tensor) and value.dim() else value

        return mapped(batch, gather)

    def _exchange(self, tensors: Sequence[Tensor], rows: int) -> list[list[Tensor]]:
        """The tensors of each rank; without values where ``counts`` says that some did not fit."""
        room = self._room
        home = tensors[0].device
        starts = [_HEADER]
        for tensor in tensors:
            each = math.prod(tensor.shape[1:]) * tensor.element_size()
            starts.append(starts[-1] + -(-room * each // _HEADER) * _HEADER)
        mine = torch.zeros(starts[-1], dtype=torch.uint8, device=home)
        mine[:8].view(torch.int64).fill_(rows)
        if rows <= room:
            for tensor, start in zip(tensors, starts, strict=False):
                _view(mine, start, rows, tensor).copy_(tensor)
        ranks = dist.get_world_size(self._group)
        together = torch.empty(ranks * starts[-1], dtype=torch.uint8, device=home)
        _all_gather(together, mine, group=self._group)
        sent = together.view(ranks, -1).unbind()
        self.counts = [int(each[:8].view(torch.int64)) for each in sent]
        return [
            [
                _view(each, start, count, tensor)
                for tensor, start in zip(tensors, starts, strict=False)
            ]
            for each, count in zip(sent, self.counts, strict=True)
            if count <= room
        ]

    def rows(self, mine: Tensor) -> list[Tensor]:
        """A tensor of every rank, each with as many rows as its batch."""
        longest = max(self.counts)
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: mine.shape[0]] = mine
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self._group)
        return [part[:count] for part, count in zip(parts, self.counts, strict=True)]


def _view(message: Tensor, start: int, rows: int, like: Tensor) -> Tensor:
    """The rows of one tensor in a message, without a copy."""
    shape = (rows, *like.shape[1:])
    length = math.prod(shape) * like.element_size()
    return message[start : start + length].view(like.dtype).view(shape)


class GatheredWindow(Collection[Any]):
    """A window whose microbatches are gathered when they are drawn."""

    def __init__(self, microbatches: Collection[Any], gather: Callable[[Any], Any]) -> None:
        self._microbatches = microbatches
        self._gather = gather

    def __len__(self) -> int:
        return len(self._microbatches)

    def __contains__(self, item: object) -> bool:
        return item in self._microbatches

    def __iter__(self) -> Iterator[Any]:
        return map(self._gather, self._microbatches)


class GatheringStep:
    """A train step that takes what the ranks of a group have as one.

    Args:
        step: Trains on the gathered windows.
        gather: Gathers one microbatch.
    """

    def __init__(self, step: EagerTrainStep, gather: Callable[[Any], Any]) -> None:
        self._step = step
        self._gather = gather

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window."""
        return self._step(GatheredWindow(microbatches, self._gather))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def weighted_sum(losses: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Losses of parts as the loss of the whole, on the device of the first."""
    home = losses[0].device
    total = losses[0] * shares[0]
    for loss, share in zip(losses[1:], shares[1:], strict=True):
        total = total + loss.to(home) * share
    return total
