"""Loaders as the loop uses them: opened at an epoch and a position, each kind in its own way."""

from __future__ import annotations

import copy
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from drivetrain.sampling import OwnOrder, epoch_seed
from drivetrain.seeding import RandomStream, host_rng_state, set_host_rng_state
from drivetrain.streams import Positions, Tracked, check_count, keeps_position

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from drivetrain.sampling import DealtBatches

_END = object()


class Feed:
    """Any iterable of batches. A position in it is reached by reading what comes before.

    An order that it draws from the generators of the host when an epoch begins is drawn again: the
    state that they had then is part of a checkpoint.

    Attributes:
        length: Batches per epoch on this rank, before any limit; None if unknown.
        notice: What was changed about the user's loader, to be said once, or empty.
        round_size: Samples of all ranks per step, where that is known; else 0.
    """

    round_size = 0

    def __init__(self, loader: Any, *, notice: str = "") -> None:
        self._loader = loader
        self._begun: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._draws = not isinstance(loader, (list, tuple))
        self.notice = notice
        self.length = length_of(loader)

    def open(self, epoch: int, skip: int = 0, samples: int | None = None) -> Iterator[Any]:
        """An iterator over the rest of an epoch.

        Args:
            epoch: The epoch.
            skip: Batches of it that this rank has seen.
            samples: Samples of it that all ranks have seen, which holds for any world size.
        """
        tell_epoch(self._loader, epoch)
        restored, self._resumed = self._resumed, None
        if restored is not None and restored["epoch"] == epoch:
            set_host_rng_state(restored["rng"])
            self._begun = restored
        elif self._draws:
            self._begun = {"epoch": epoch, "rng": host_rng_state()}
        return _without(iter(self._loader), skip)

    def state_dict(self) -> dict[str, Any] | None:
        """What a position needs besides the number of batches, or None."""
        return None if self._begun is None else {"begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what ``state_dict`` returned, before ``open``."""
        if state is not None and "begun" in state:
            self._resumed = state["begun"]


class DealtFeed(Feed):
    """A ``DataLoader`` over a map-style data set, in our order: starts at any sample.

    Args:
        loader: A copy of the user's loader.
        dealt: Its batch sampler.
        seed: The run's seed.
    """

    def __init__(
        self, loader: DataLoader[Any], dealt: DealtBatches, *, seed: int, notice: str
    ) -> None:
        self._dealt = dealt
        self._seed = seed
        super().__init__(loader, notice=notice)

    @property
    def round_size(self) -> int:  # type: ignore[override]  # known only here
        """Samples of all ranks per step."""
        return self._dealt.round_size

    def open(self, epoch: int, skip: int = 0, samples: int | None = None) -> Iterator[Any]:
        """The rest of an epoch, without reading what comes before."""
        self._dealt.epoch = epoch
        self._dealt.start = skip * self._dealt.round_size if samples is None else samples
        _seed_workers(self._loader, self._seed, epoch)
        batches: Iterator[Any] = iter(self._loader)
        return batches


class OwnOrderFeed(Feed):
    """A ``DataLoader`` over a map-style data set, in the order of the user's own batch sampler.

    Args:
        loader: A copy of the user's loader.
        order: What stands for the batch sampler.
        seed: The run's seed.
    """

    def __init__(self, loader: DataLoader[Any], order: OwnOrder, *, seed: int, notice: str) -> None:
        self._order = order
        self._seed = seed
        super().__init__(loader, notice=notice)

    def open(self, epoch: int, skip: int = 0, samples: int | None = None) -> Iterator[Any]:
        """The rest of an epoch: what comes before is drawn, and not read."""
        self._order.epoch, self._order.skip = epoch, skip
        _seed_workers(self._loader, self._seed, epoch)
        batches: Iterator[Any] = iter(self._loader)
        return batches


class StreamFeed(Feed):
    """A ``DataLoader`` over an iterable data set that keeps no position: read from the beginning.

    What it draws while it gives a batch depends on seed and epoch alone.

    Args:
        loader: A copy of the user's loader.
        seed: The run's seed.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, notice: str) -> None:
        super().__init__(loader, notice=notice)
        self._draws = False
        self._seed = seed

    def open(self, epoch: int, skip: int = 0, samples: int | None = None) -> Iterator[Any]:
        """The rest of an epoch."""
        tell_epoch(self._loader, epoch)
        _seed_workers(self._loader, self._seed, epoch)
        stream: RandomStream | None = None
        if not self._loader.num_workers:
            stream = RandomStream(epoch_seed(self._seed, epoch))
        return _without(_drawn(self._loader, stream), skip)


class KeptStreamFeed(Feed):
    """A ``DataLoader`` over an iterable data set that keeps its position.

    Args:
        loader: A copy of the user's loader.
        seed: The run's seed.
        rank: This rank.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, rank: int, notice: str) -> None:
        super().__init__(loader, notice=notice)
        self._draws = False
        self._seed = seed
        self._dataset: Any = loader.dataset
        self._tracked = Tracked(loader.dataset, seed=seed, rank=rank, width=loader.batch_size)
        loader.__dict__["dataset"] = self._tracked
        self._positions = Positions(loader, self._tracked) if loader.num_workers else None
        self._restored = False
        self._over = False

    def open(self, epoch: int, skip: int = 0, samples: int | None = None) -> Iterator[Any]:
        """The rest of an epoch, from where the data set says it is."""
        tell_epoch(self._dataset, epoch)
        _seed_workers(self._loader, self._seed, epoch)
        restored, self._restored = self._restored, False
        if self._positions is not None:
            batches = self._positions.read(skip if restored else 0)
        elif restored and skip and self._over:
            batches = iter(())
        else:
            batches = iter(self._loader)
        return batches if restored else _without(batches, skip)

    def state_dict(self) -> dict[str, Any] | None:
        """The state of the data set, or that of each worker's copy."""
        if self._positions is not None:
            return self._positions.state_dict()
        return {"count": 0, "dataset": self._dataset.state_dict(), "over": self._tracked.over}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore it.

        Raises:
            CheckpointError: It was saved with another number of workers.
        """
        if state is None or "count" not in state:
            return
        check_count(state["count"], self._loader.num_workers)
        if self._positions is not None:
            self._positions.load_state_dict(state)
        else:
            self._dataset.load_state_dict(state["dataset"])
            self._over = self._tracked.over = state["over"]
        self._restored = True


class KeptFeed(Feed):
    """A loader that keeps its own position, such as torchdata's ``StatefulDataLoader``.

    Args:
        loader: The user's loader itself.
        seed: The run's seed.
    """

    def __init__(self, loader: Any, *, seed: int, notice: str) -> None:
        super().__init__(loader, notice=notice)
        self._seed = seed
        self._restored = False

    def open(self, epoch: int, skip: int = 0, samples: int | None = None) -> Iterator[Any]:
        """The rest of an epoch, from where the loader says it is."""
        tell_epoch(self._loader, epoch)
        restored, self._restored = self._restored, False
        seed = epoch_seed(self._seed, epoch)
        if restored and not skip:
            # The restored state is that of the epoch before, and its first iterator goes on there.
            with RandomStream(seed):
                iter(self._loader)
        with RandomStream(seed):
            batches: Iterator[Any] = iter(self._loader)
        return batches if restored else _without(batches, skip)

    def state_dict(self) -> dict[str, Any] | None:
        """The position that the loader keeps."""
        return {"loader": self._loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore it."""
        if state is not None and "loader" in state:
            self._loader.load_state_dict(state["loader"])
            self._restored = True


def undealt(loader: Any, *, seed: int, rank: int, notice: str) -> Feed:
    """The feed of a loader whose samples are not dealt out: it gives what it gives."""
    if keeps_position(loader):
        return KeptFeed(loader, seed=seed, notice=notice)
    if not isinstance(loader, DataLoader):
        return Feed(loader, notice=notice)
    if isinstance(loader.dataset, IterableDataset):
        ours = copied(loader)
        if keeps_position(loader.dataset):
            return KeptStreamFeed(ours, seed=seed, rank=rank, notice=notice)
        return StreamFeed(ours, seed=seed, notice=notice)
    which = "sampler" if loader.batch_sampler is None else "batch_sampler"
    order = OwnOrder(
        getattr(loader, which), seed=seed, rank=rank, to_workers=reads_elsewhere(loader)
    )
    return OwnOrderFeed(copied(loader, **{which: order}), order, seed=seed, notice=notice)


def copied(loader: DataLoader[Any], **parts: Any) -> DataLoader[Any]:
    """A copy of a loader with other parts. A subclass may have a constructor of its own."""
    ours = copy.copy(loader)
    ours.__dict__.update(parts, _iterator=None)
    return ours


def reads_elsewhere(loader: DataLoader[Any]) -> bool:
    """Whether other processes read the samples."""
    method = getattr(loader, "worker_method", None) or "multiprocessing"
    return loader.num_workers > 0 and method == "multiprocessing"


def length_of(loader: Any) -> int | None:
    """Batches per epoch, or None if the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def tell_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch`` of whatever has it: the loader, its data set, sampler or batch sampler."""
    batcher = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None))
    for each in (*parts, batcher, getattr(batcher, "sampler", None)):
        set_epoch: Any = getattr(each, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _seed_workers(loader: DataLoader[Any], seed: int, epoch: int) -> None:
    """Seed workers by the epoch, and not by a draw from the global generator."""
    loader.__dict__["generator"] = torch.Generator().manual_seed(epoch_seed(seed, epoch))


def _without(batches: Iterator[Any], skip: int) -> Iterator[Any]:
    """The iterator after so many batches, which are read."""
    for _ in islice(batches, skip):
        pass
    return batches


def _drawn(loader: Any, stream: RandomStream | None) -> Iterator[Any]:
    """What a loader gives, with random numbers of its own while it does."""
    if stream is None:
        yield from loader
        return
    with stream:
        batches = iter(loader)
    while True:
        with stream:
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch
