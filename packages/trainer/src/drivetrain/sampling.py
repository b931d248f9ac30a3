"""Which samples this rank sees, as a pure function of seed, epoch and position.

An epoch is one order of the data set. Step ``k`` of a run with ``world`` ranks and ``batch_size``
samples per rank takes the next ``world × batch_size`` samples of that order, dealt out to the ranks
like cards. So a position is a number of samples, a resumed run continues at it without reading what
came before, and a run that resumes with another world size still sees each remaining sample once.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch, far from those of its neighbours."""
    return random.Random(f"{seed}/{epoch}").getrandbits(63)  # noqa: S311 - not for secrets


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
        drawn = epoch_seed(seed, epoch)
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
        own = getattr(sampler, "generator", None)
        generators = [torch.default_generator, *([own] if isinstance(own, torch.Generator) else [])]
        states = [generator.get_state() for generator in generators]
        python, numpy = random.getstate(), np.random.get_state()
        try:
            for generator in generators:
                generator.manual_seed(drawn)
            random.seed(drawn)
            np.random.seed(drawn % 2**32)
            return list(sampler)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            random.setstate(python)
            np.random.set_state(numpy)

    return order


class DealtBatches(Sampler[list[int]]):
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
    ) -> None:
        self.epoch = 0
        self.start = 0
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

    def __iter__(self) -> Iterator[list[int]]:
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
            if batch:
                yield batch

    def __len__(self) -> int:
        """Batches from ``start`` to the end of the epoch on this rank."""
        left = max(0, self._size - self.start)
        full, rest = divmod(left, self.round_size)
        partial = rest > 0 and not self._drop_last and (self._even or rest > self._rank)
        return full + partial
