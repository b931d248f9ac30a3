"""Which samples this rank sees, as a pure function of seed, epoch and position.

An epoch is one order of the data set. Step ``k`` of a run with ``world`` ranks and ``batch_size``
samples per rank takes the next ``world × batch_size`` samples of that order, dealt out to the ranks
like cards. So a position is a number of samples, a resumed run continues at it without reading what
came before, and a run that resumes with another world size still sees each remaining sample once.
"""

from __future__ import annotations

import random
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler, get_worker_info

from drivetrain.seeding import RandomStream, seed_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch, far from those of its neighbours."""
    return seed_of(seed, epoch)


def shuffled(size: int) -> Callable[[int, int], list[int]]:
    """The order function of a shuffled data set of ``size`` samples."""

    def order(seed: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        drawn: list[int] = torch.randperm(size, generator=generator).tolist()
        return drawn

    return order


def in_sequence(size: int) -> Callable[[int, int], list[int]]:
    """The order function of a data set that is not shuffled."""

    def order(_seed: int, _epoch: int) -> list[int]:
        return list(range(size))

    return order


def drawn_by(sampler: Any) -> Callable[[int, int], list[int]]:
    """The order function of a user's sampler: what it draws when seeded for the epoch.

    All generators of the host are as they were afterwards; those of devices are never touched.
    """

    def order(seed: int, epoch: int) -> list[int]:
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
        drawn = epoch_seed(seed, epoch)
        own = getattr(sampler, "generator", None)
        state = own.get_state() if isinstance(own, torch.Generator) else None
        try:
            with RandomStream(drawn):
                if isinstance(own, torch.Generator):
                    own.manual_seed(drawn)
                return list(sampler)
        finally:
            if isinstance(own, torch.Generator) and state is not None:
                own.set_state(state)

    return order


class Sent:
    """Indices on their way to a loader's worker, whose generators are seeded when they arrive.

    So what a worker draws for a batch, as for augmentation, depends on the batch's place in the run
    and on nothing before it: not on the number of workers, nor on where the run was resumed.

    Args:
        indices: What the worker is to read.
        place: The seed of the run, the epoch, and the batch's place in it.
    """

    __slots__ = ("indices", "place")

    def __init__(self, indices: Any, place: tuple[int, ...]) -> None:
        self.indices = indices
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.indices, self.place)


def _arrived(indices: Any, place: tuple[int, ...]) -> Any:
    if get_worker_info() is not None:
        seed_host(seed_of(*place))
    return indices


def seed_of(*place: int) -> int:
    """A seed for one place in a run, far from those of its neighbours."""
    return random.Random("/".join(map(str, place))).getrandbits(63)  # noqa: S311 - not for secrets


class DealtBatches(Sampler[Any]):
    """The batches of one rank. Set ``epoch`` and ``start`` before iterating.

    Args:
        order: From seed and epoch to the order of the whole data set.
        size: How many samples an order holds.
        batch_size: Samples per rank and batch.
        seed: The run's seed.
        rank: This rank.
        world: Number of ranks.
        drop_last: Leave out a last round that does not fill every rank's batch.
        even: Let all ranks have equally many batches of equal size, by repeating up to
            ``world - 1`` samples at the end of an epoch; for training. Without it every sample is
            seen exactly once and ranks may have a batch more or less; for evaluation.
        to_workers: Whether other processes read the samples.
    """

    def __init__(
        self,
        order: Callable[[int, int], list[int]],
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int,
        world: int,
        drop_last: bool,
        even: bool,
        to_workers: bool = False,
    ) -> None:
        self.epoch = 0
        self.start = 0
        self._to_workers = to_workers
        self._order = order
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world = world
        self._drop_last = drop_last
        self._even = even

    @property
    def round_size(self) -> int:
        """Samples that all ranks together take per step."""
        return self._batch_size * self._world

    def __iter__(self) -> Iterator[Any]:
        order = self._order(self._seed, self.epoch)[: self._size]
        for begin in range(self.start, self._size, self.round_size):
            dealt = order[begin : begin + self.round_size]
            if len(dealt) < self.round_size:
                if self._drop_last:
                    return
                if self._even and len(dealt) % self._world:
                    missing = self._world - len(dealt) % self._world
                    dealt = dealt + [order[n % self._size] for n in range(missing)]
            batch = dealt[self._rank :: self._world]
            if batch and self._to_workers:
                yield Sent(batch, (self._seed, self.epoch, begin + self._rank))
            elif batch:
                yield batch

    def __len__(self) -> int:
        """Batches from ``start`` to the end of the epoch on this rank."""
        left = max(0, self._size - self.start)
        full, rest = divmod(left, self.round_size)
        partial = rest > 0 and not self._drop_last and (self._even or rest > self._rank)
        return full + partial


_END = object()


class OwnOrder(Sampler[Any]):
    """What a user's own sampler or batch sampler gives, as a function of seed, epoch and position.

    It draws from generators that are seeded for the epoch, alike on all ranks, so that its order is
    the same when a run is resumed. Set ``epoch`` and ``skip`` before iterating.

    Args:
        sampler: The user's object.
        seed: The run's seed.
        rank: This rank.
        to_workers: Whether other processes read the samples.
    """

    def __init__(self, sampler: Any, *, seed: int, rank: int, to_workers: bool) -> None:
        self.epoch = 0
        self.skip = 0
        self._sampler = sampler
        self._seed = seed
        self._rank = rank
        self._to_workers = to_workers

    def __iter__(self) -> Iterator[Any]:
        seed = epoch_seed(self._seed, self.epoch)
        stream = RandomStream(seed)
        with stream:
            for each in (self._sampler, getattr(self._sampler, "sampler", None)):
                set_epoch: Any = getattr(each, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(self.epoch)
                if isinstance(own := getattr(each, "generator", None), torch.Generator):
                    own.manual_seed(seed)
            drawn = iter(self._sampler)
        for number in count():
            with stream:
                indices = next(drawn, _END)
            if indices is _END:
                return
            if number < self.skip:
                continue
            if self._to_workers:
                yield Sent(indices, (self._seed, self.epoch, number, self._rank))
            else:
                yield indices

    def __len__(self) -> int:
        """Of the user's object, the whole epoch; ``TypeError`` if it has none."""
        return len(self._sampler)
