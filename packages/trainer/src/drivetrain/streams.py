"""Iterable data sets that keep their position: where each copy of them is.

Workers read ahead, so their own copies of a data set are further than the batches that were trained
on. Each batch therefore brings the state that its worker's copy had right after it, and a resumed
run gives each worker the state of the last batch that was used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from drivetrain_interfaces import CheckpointError
from torch.utils.data import IterableDataset, get_worker_info

from drivetrain.sampling import seed_of
from drivetrain.seeding import seed_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.utils.data import DataLoader

_NOTHING = "drivetrain: no sample"


def keeps_position(thing: Any) -> bool:
    """Whether it saves and restores its position, as loaders and data sets of torchdata do."""
    return callable(getattr(thing, "state_dict", None)) and callable(
        getattr(thing, "load_state_dict", None)
    )


class Brought(NamedTuple):
    """What a worker sends: a batch, and how far its copy of the data set is.

    A tuple, so that pinning memory finds the tensors in it.
    """

    batch: Any
    worker: int = -1
    given: int = 0
    state: Any = None
    over: bool = False


class Tracked(IterableDataset[Any]):
    """A data set whose copies in workers begin where those of the saved run were.

    It also knows whether an epoch is over, which the state of the data set may not say: that of one
    that has just ended may be that of one that is about to begin. The user's code never meets it:
    in a worker, ``get_worker_info().dataset`` is the user's own.

    Args:
        dataset: The user's data set.
        seed: The run's seed.
        rank: This rank.
        width: Samples that make a batch; None if the data set gives whole batches.
    """

    def __init__(self, dataset: Any, *, seed: int, rank: int, width: int | None) -> None:
        self.dataset = dataset
        self.given = 0
        self.over = False
        self.resumed: Mapping[str, Any] | None = None
        self._seed = seed
        self._rank = rank
        self._width = width

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        self.over = False
        if info is None:
            yield from self.dataset
            self.over = True
            return
        worker = info.id
        resumed, self.resumed = self.resumed, None
        if resumed is not None and str(worker) in resumed["workers"]:
            own = resumed["workers"][str(worker)]
            self.dataset.load_state_dict(own["state"])
            self.given = own["given"]
            if own["ended"]:
                return
        if resumed is not None and worker <= resumed["last"]:
            # Batches come from the workers in turn, and the next one is another worker's.
            yield from [_NOTHING] * (self._width or 1)
        self.reseed(worker)
        yield from self.dataset
        self.over = True

    def reseed(self, worker: int) -> None:
        """Make what is drawn for the next batch depend on the batch's place alone."""
        seed_host(seed_of(self._seed, self._rank, worker, self.given))

    def __len__(self) -> int:
        """Of the user's data set; ``TypeError`` if it has none."""
        return len(self.dataset)


class Bringing:
    """The user's collation, with the state of the data set added. Runs in the worker.

    Args:
        collate: The user's function.
        tracked: The data set.
    """

    def __init__(self, collate: Callable[[Any], Any], tracked: Tracked) -> None:
        self._collate = collate
        self.tracked = tracked

    def __call__(self, samples: Any) -> Brought:
        """The batch of these samples, and the state after them."""
        info = get_worker_info()
        assert info is not None, "it is for workers"
        first = samples[0] if isinstance(samples, list) and samples else samples
        if isinstance(first, str) and first == _NOTHING:
            return Brought(None)
        batch, tracked = self._collate(samples), self.tracked
        tracked.given += 1
        tracked.reseed(info.id)
        state = tracked.dataset.state_dict()
        return Brought(batch, info.id, tracked.given, state, tracked.over)


class Preparing:
    """What a worker does first: let the user's code meet the user's data set, then call it."""

    def __init__(self, tracked: Tracked, user: Callable[[int], None] | None) -> None:
        self._tracked = tracked
        self._user = user

    def __call__(self, worker: int) -> None:
        """Prepare this worker."""
        # It is frozen, and says which data set the worker has a copy of.
        object.__setattr__(get_worker_info(), "dataset", self._tracked.dataset)
        if self._user is not None:
            self._user(worker)


class Positions:
    """How far each worker's copy is, as the main process knows it.

    Args:
        loader: A copy of the user's loader, which is changed.
        tracked: Its data set.
    """

    def __init__(self, loader: DataLoader[Any], tracked: Tracked) -> None:
        self._loader = loader
        self._persistent = loader.persistent_workers
        self._tracked = tracked
        own = loader.__dict__
        own["worker_init_fn"] = Preparing(self._tracked, loader.worker_init_fn)
        own["collate_fn"] = Bringing(loader.collate_fn, self._tracked)
        self._workers: dict[int, Brought] = {}
        self._before: dict[int, int] = {}  # what each had given before this epoch
        self._last = -1
        self._restored: Mapping[str, Any] | None = None

    def read(self, skip: int) -> Iterator[Any]:
        """The batches of an epoch from the restored position on, or from its beginning."""
        resumed, self._restored = self._restored, None
        if not skip:
            resumed = self._at_the_beginning(resumed)
        self._tracked.resumed = resumed
        batches = iter(self._loader)
        self._tracked.resumed = None
        for brought in batches:
            if brought.worker < 0:
                continue
            self._workers[brought.worker] = Brought(None, *brought[1:])
            self._last = brought.worker
            yield brought.batch

    def _at_the_beginning(self, resumed: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """An epoch begins with worker 0; only workers that persist go on with their copies."""
        self._last = -1
        if not self._persistent:
            self._workers, self._before = {}, {}
            return None
        self._before = {worker: brought.given for worker, brought in self._workers.items()}
        self._workers = {
            key: brought._replace(over=False) for key, brought in self._workers.items()
        }
        return None if resumed is None else self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The state of each worker's copy, and whose turn was last."""
        given = {
            worker: brought.given - self._before.get(worker, 0)
            for worker, brought in self._workers.items()
        }
        rounds = given.get(self._last, 0)
        return {
            "count": self._loader.num_workers,
            "last": self._last,
            "workers": {
                str(worker): {
                    "state": brought.state,
                    "given": brought.given,
                    "before": self._before.get(worker, 0),
                    # Or it has missed a turn, which says the same.
                    "ended": brought.over or given[worker] < rounds - (worker > self._last),
                }
                for worker, brought in self._workers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next epoch that is read where ``state`` says."""
        self._restored = state
        self._last = state["last"]
        self._workers, self._before = {}, {}
        for key, own in state["workers"].items():
            self._workers[int(key)] = Brought(
                None, int(key), own["given"], own["state"], own["ended"]
            )
            self._before[int(key)] = own["before"]


def check_count(saved: int, here: int) -> None:
    """Refuse a position that was saved with another number of workers.

    Raises:
        CheckpointError: It was.
    """
    if saved != here:
        raise CheckpointError(
            f"The position of an iterable data set was saved with num_workers={saved}, and this "
            f"loader has num_workers={here}.",
            "Use the same number of workers.",
        )
