"""Loaders: sharded over ranks, shuffled by the run's seed, and able to start anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError, DataError
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from drivetrain.feeds import DealtFeed, Feed, copied, length_of, reads_elsewhere, undealt
from drivetrain.sampling import DealtBatches, drawn_by, in_sequence, shuffled
from drivetrain.streams import keeps_position

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import World


def feed_of(
    loader: Any, world: World, *, seed: int, training: bool, distribute: bool, name: str
) -> Feed:
    """Bring any iterable of batches into the loop's shape.

    A ``DataLoader`` over a map-style data set is copied with a batch sampler of ours; everything
    else gives what it gives, on every rank.

    Args:
        loader: A ``DataLoader`` or any iterable of batches.
        world: This process's place.
        seed: The run's seed.
        training: Whether ranks need equally many batches.
        distribute: Whether ranks share the samples out; False gives each rank all of them.
        name: How messages call it.

    Raises:
        DataError: It cannot be iterated, or is empty.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise DataError(
            f"The {name} is a {type(loader).__name__}, which cannot be iterated.",
            "Give a DataLoader or another iterable of batches.",
        )
    if length_of(loader) == 0:
        raise DataError(
            f"The {name} is empty: it has no batch.",
            "Give it data, or a batch size that is not larger than the data set with drop_last.",
        )
    if not (isinstance(loader, DataLoader) and _is_ours_to_deal(loader)):
        if isinstance(loader, Iterator):
            raise DataError(
                f"The {name} is an iterator, which can be read only once.",
                "Give an iterable that starts anew each time, such as a list or a DataLoader.",
            )
        notice = ""
        if world.size > 1 and distribute:
            notice = (
                f"The {name} is used as it is on each of the {world.size} ranks; it must itself "
                "give each rank its own part."
            )
        return undealt(loader, seed=seed, rank=world.rank, notice=notice)
    if not distribute and world.size > 1:
        world = type(world)()
    # What the user gave as batch_sampler counts; the loader's own sampler is then only a default.
    batcher: Any = loader.batch_sampler
    order, notice = _order_of(loader, batcher.sampler, name, world)
    dealt = DealtBatches(
        order,
        len(batcher.sampler),
        batcher.batch_size,
        seed=seed,
        rank=world.rank,
        world=world.size,
        drop_last=batcher.drop_last,
        even=training,
        to_workers=reads_elsewhere(loader),
    )
    feed = DealtFeed(copied(loader, batch_sampler=dealt), dealt, seed=seed, notice=notice)
    if training and not feed.length:
        raise DataError(
            f"The {name} gives no batch to each of {world.size} ranks: it holds "
            f"{len(batcher.sampler)} samples, and one step takes {dealt.round_size}.",
            "Use a smaller batch size, fewer processes, or drop_last=False.",
        )
    return feed


def loaders_of(given: Any) -> list[Any]:
    """One loader or several: a list counts as several only if all its items are loaders."""
    if given is None:
        return []
    if (
        isinstance(given, (list, tuple))
        and given
        and all(isinstance(item, DataLoader) for item in given)
    ):
        return list(given)
    return [given]


def limited(length: int | None, limit: float | None, name: str) -> int | None:
    """How many batches of a loader to use.

    Args:
        length: Batches it has, or None if unknown.
        limit: A whole number of batches, a fraction from 0.0 to 1.0, or None for all.
        name: The Trainer's argument, for messages.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return length
    if isinstance(limit, int):
        return limit if length is None else min(limit, length)
    if length is None:
        raise ConfigurationError(
            f"{name}={limit!r} is a fraction, and the loader has no length.",
            "Give a whole number of batches.",
        )
    used = int(length * limit)
    if used == 0 and limit > 0:
        raise ConfigurationError(
            f"{name}={limit!r} of {length} batches is less than one batch.",
            "Give a whole number of batches or a larger fraction.",
        )
    return used


def _is_ours_to_deal(loader: DataLoader[Any]) -> bool:
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return (
        not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and hasattr(sampler, "__len__")
        and not isinstance(sampler, DistributedSampler)  # it has dealt already
        and not keeps_position(loader)
    )


def _order_of(
    loader: DataLoader[Any], sampler: Any, name: str, world: World
) -> tuple[Callable[[int, int], list[int]], str]:
    size = len(loader.dataset)  # type: ignore[arg-type]  # a map-style data set has a length
    if type(sampler) is SequentialSampler:
        return in_sequence(size), ""
    plain = isinstance(sampler, RandomSampler) and not sampler.replacement
    if type(sampler) is RandomSampler and plain and sampler.num_samples == size:
        return shuffled(size), ""
    notice = ""
    if world.size > 1:
        notice = (
            f"The {type(sampler).__name__} of the {name} is drawn from on every rank with the same "
            f"seed, and its samples are dealt out to the {world.size} ranks."
        )
    return drawn_by(sampler), notice
