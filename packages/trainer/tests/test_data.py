"""Loaders of any kind, brought into the loop's shape."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from drivetrain_interfaces import ConfigurationError, DataError, World
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from drivetrain.data import feed_of, limited, loaders_of

TWENTY = list(range(20))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TWENTY)


class Augmented(Dataset):
    """Adds noise from torch's global generator, as augmentation in a worker does."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index + torch.rand(())


class OwnLoader(DataLoader):
    """A loader whose constructor takes something else than a DataLoader's."""

    def __init__(self, path, *, size):
        super().__init__(TWENTY, batch_size=size, shuffle=True)
        self.path = path

    def describe(self):
        return self.path


class Shards:
    """An iterable without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Stateful:
    """A loader that keeps its own position, as those of torchdata do."""

    def __init__(self):
        self.position = 0
        self.restored = 0

    def __len__(self):
        return 5

    def __iter__(self):
        begin, self.position = self.position, 0
        for n in range(begin, 5):
            self.position = n + 1
            yield n
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.restored += 1
        self.position = state["position"]


def world(rank=0, size=1):
    several = size > 1
    return World(
        rank, size, rank, size, address="localhost" if several else "", port=1 if several else 0
    )


def feed(loader, rank=0, size=1, *, seed=3, training=True, distribute=True):
    return feed_of(
        loader,
        world(rank, size),
        seed=seed,
        training=training,
        distribute=distribute,
        name="train loader",
    )


def samples(batches):
    return [int(sample) for batch in batches for sample in batch]


# Sharding
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_out_the_samples_of_a_loader(size, shuffle):
    loader = DataLoader(TWENTY, batch_size=2, shuffle=shuffle)
    feeds = [feed(loader, rank, size, training=False) for rank in range(size)]
    seen = sorted(sample for each in feeds for sample in samples(each.open(0)))
    assert seen == TWENTY
    assert [each.length for each in feeds] == [len(list(each.open(0))) for each in feeds]


def test_each_epoch_has_its_own_order_which_the_seed_fixes():
    loader = DataLoader(TWENTY, batch_size=4, shuffle=True)
    first = feed(loader)
    orders = [samples(first.open(epoch)) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert [samples(feed(loader).open(epoch)) for epoch in range(3)] == orders
    assert samples(feed(loader, seed=4).open(0)) != orders[0]


def test_without_shuffling_the_order_is_that_of_the_data_set():
    assert samples(feed(DataLoader(TWENTY, batch_size=4)).open(2)) == TWENTY


def test_every_rank_gets_everything_where_samples_are_not_to_be_shared_out():
    loader = DataLoader(TWENTY, batch_size=4, shuffle=True)
    seen = [samples(feed(loader, rank, 2, distribute=False).open(0)) for rank in range(2)]
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == TWENTY


@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_opens_at_any_batch(size):
    loader = DataLoader(TWENTY, batch_size=3, shuffle=True)
    for rank in range(size):
        one = feed(loader, rank, size)
        whole = [batch.tolist() for batch in one.open(1)]
        for skip in range(len(whole) + 1):
            assert [batch.tolist() for batch in one.open(1, skip)] == whole[skip:]
            rest = one.open(1, skip, skip * one.round_size)
            assert [batch.tolist() for batch in rest] == whole[skip:]


def test_the_size_of_a_round_is_known_also_at_the_end_of_an_epoch():
    one = feed(DataLoader(TWENTY, batch_size=4), 0, 2)
    assert list(one.open(0, 3)) == []
    assert one.round_size == 8


def test_opening_late_reads_no_sample_that_was_seen():
    asked = []

    class Counting(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            asked.append(index)
            return index

    rest = samples(feed(DataLoader(Counting(), batch_size=4)).open(0, 3))
    assert rest == asked == TWENTY[12:]


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (4, 2), (2, 4), (3, 2), (4, 2, 1), (1, 4, 3)])
def test_each_sample_is_seen_once_however_often_the_number_of_ranks_changes(worlds):
    data = list(range(96))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    seen = []
    for number, size in enumerate(worlds):
        count = len(seen)
        for rank in range(size):
            stream = feed(loader, rank, size).open(1, 0, count)
            seen += samples(stream if number == len(worlds) - 1 else islice(stream, 3))
    assert sorted(seen) == data


def test_drop_last_and_collation_are_the_loader_s():
    loader = DataLoader(TWENTY, batch_size=3, drop_last=True, collate_fn=tuple)
    batches = list(feed(loader).open(0))
    assert batches[0] == (0, 1, 2)
    assert len(batches) == feed(loader).length == 6


# The user's object
def test_a_subclass_with_a_constructor_of_its_own_keeps_its_class():
    loader = OwnLoader("digits", size=4)
    one = feed(loader, 1, 2)
    assert len(samples(one.open(0))) == 10
    assert isinstance(one._loader, OwnLoader)
    assert one._loader.describe() == "digits"


def test_the_user_s_loader_is_left_as_it_was():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TWENTY, batch_size=4, shuffle=True, generator=generator)
    before, state = copy.copy(loader.__dict__), generator.get_state()
    one = feed(loader, 0, 2)
    list(one.open(0))
    list(one.open(1, 1))
    assert loader.__dict__ == before
    assert torch.equal(generator.get_state(), state)
    assert len(loader) == 5
    assert sorted(samples(loader)) == TWENTY


def test_drawing_a_loader_leaves_the_global_generator_as_it_was():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(feed(DataLoader(TWENTY, batch_size=4, shuffle=True)).open(0))
    assert torch.equal(torch.get_rng_state(), before)


# Samplers
def test_a_custom_sampler_is_drawn_from_once_and_dealt_out():
    loader = DataLoader(
        TWENTY, batch_size=2, sampler=WeightedRandomSampler([1.0] * 20, 16, replacement=False)
    )
    feeds = [feed(loader, rank, 2) for rank in range(2)]
    seen = [samples(each.open(0)) for each in feeds]
    assert len(set(seen[0] + seen[1])) == 16
    assert "WeightedRandomSampler" in feeds[0].notice
    assert feed(loader).notice == ""


def test_a_sampler_over_part_of_the_data_is_not_widened():
    loader = DataLoader(TWENTY, batch_size=4, sampler=SequentialSampler(range(10)))
    assert samples(feed(loader).open(0)) == TWENTY[:10]
    drawn = samples(feed(DataLoader(TWENTY, batch_size=4, sampler=RandomSampler(range(7)))).open(0))
    assert sorted(drawn) == TWENTY[:7]


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_plain_batch_sampler_decides_size_order_and_what_is_dropped(drop_last):
    batches = BatchSampler(RandomSampler(TWENTY), batch_size=6, drop_last=drop_last)
    loader = DataLoader(TWENTY, batch_sampler=batches)
    one = feed(loader)
    seen = [batch.tolist() for batch in one.open(0)]
    assert [len(batch) for batch in seen] == ([6, 6, 6] if drop_last else [6, 6, 6, 2])
    assert samples(one.open(0)) != sorted(samples(one.open(0)))
    shared = [samples(feed(loader, rank, 2, training=False).open(0)) for rank in range(2)]
    assert len(set(shared[0] + shared[1])) == (12 if drop_last else 20)


def test_a_batch_sampler_of_ones_own_is_used_as_it_is_and_told_the_epoch():
    class Halves(BatchSampler):
        def __init__(self):
            super().__init__(SequentialSampler(TWENTY), 10, drop_last=False)
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    halves = Halves()
    one = feed(DataLoader(TWENTY, batch_sampler=halves), 1, 2)
    assert samples(one.open(4)) == TWENTY
    assert halves.epochs == [4]
    assert "must itself give each rank its own part" in one.notice


@pytest.mark.parametrize("as_batches", [True, False])
def test_a_distributed_sampler_has_dealt_already(as_batches):
    def loader(rank):
        sampler = DistributedSampler(TWENTY, num_replicas=2, rank=rank, seed=5)
        if as_batches:
            return DataLoader(TWENTY, batch_sampler=BatchSampler(sampler, 5, drop_last=False))
        return DataLoader(TWENTY, batch_size=5, sampler=sampler)

    feeds = [feed(loader(rank), rank, 2) for rank in range(2)]
    for epoch in range(2):
        seen = [samples(each.open(epoch)) for each in feeds]
        assert sorted(seen[0] + seen[1]) == TWENTY
    assert samples(feeds[0].open(0)) != samples(feeds[0].open(1))


# What is not a DataLoader over a map-style data set
def test_an_iterable_data_set_is_read_up_to_the_position():
    one = feed(DataLoader(Stream(), batch_size=4))
    assert one.length is None
    assert one.round_size == 0
    assert samples(one.open(0)) == TWENTY
    assert samples(one.open(0, 2)) == TWENTY[8:]


def test_a_list_of_batches_is_a_loader():
    batches = [torch.full((2,), n) for n in range(4)]
    one = feed(batches)
    assert one.length == 4
    assert list(one.open(0)) == batches
    assert list(one.open(1, 3)) == batches[3:]


def test_any_iterable_is_a_loader():
    one = feed(Shards([1, 2, 3]))
    assert one.length is None
    assert list(one.open(0, 1)) == [2, 3]


@pytest.mark.parametrize(
    ("training", "distribute", "says"),
    [(True, True, True), (False, True, True), (True, False, False)],
)
def test_on_several_ranks_it_is_said_that_each_reads_the_same(training, distribute, says):
    one = feed([1, 2], 0, 2, training=training, distribute=distribute)
    assert bool(one.notice) == says
    assert feed([1, 2]).notice == ""


def test_a_loader_that_keeps_its_position_is_asked_for_it():
    loader = Stateful()
    one = feed(loader)
    stream = one.open(0)
    assert [next(stream), next(stream)] == [0, 1]
    state = one.state_dict()
    resumed = feed(Stateful())
    resumed.load_state_dict(state)
    assert list(resumed.open(0, 2)) == [2, 3, 4]
    assert list(resumed.open(1)) == [0, 1, 2, 3, 4]


def test_a_data_loader_that_keeps_its_position_is_not_dealt():
    class Kept(DataLoader):
        def state_dict(self):
            return {"position": 3}

        def load_state_dict(self, state):
            self.loaded = state

    loader = Kept(TWENTY, batch_size=4)
    one = feed(loader)
    one.load_state_dict(one.state_dict())
    assert one.round_size == 0
    assert loader.loaded == {"position": 3}


def test_a_loader_without_a_position_saves_none():
    one = feed([1, 2])
    assert one.state_dict() is None
    one.load_state_dict(None)
    assert list(one.open(0)) == [1, 2]


# Refusals
@pytest.mark.parametrize("loader", [[], (), DataLoader([1], batch_size=2, drop_last=True)])
def test_an_empty_loader_is_refused(loader):
    with pytest.raises(DataError, match="The train loader is empty"):
        feed(loader)


@pytest.mark.parametrize("loader", [None, 3, object()])
def test_what_cannot_be_iterated_is_refused(loader):
    with pytest.raises(DataError, match="cannot be iterated"):
        feed(loader)


def test_a_loader_that_is_too_short_for_all_ranks_is_refused():
    loader = DataLoader(TWENTY, batch_size=8, drop_last=True)
    with pytest.raises(DataError, match="holds 20 samples, and one step takes 24"):
        feed(loader, 0, 3)
    assert feed(loader, 2, 3, training=False).length == 0


# Several loaders, limits
def test_a_list_counts_as_several_loaders_only_if_all_items_are_loaders():
    first, second = DataLoader([1]), DataLoader([2])
    assert loaders_of([first, second]) == [first, second]
    assert loaders_of((first,)) == [first]
    assert loaders_of(first) == [first]
    batches = [torch.zeros(1)]
    assert loaders_of(batches) == [batches]
    assert loaders_of(None) == []


@pytest.mark.parametrize(
    ("length", "limit", "used"),
    [
        (10, None, 10),
        (None, None, None),
        (10, 3, 3),
        (10, 30, 10),
        (10, 0, 0),
        (None, 3, 3),
        (10, 0.5, 5),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (None, 1.0, None),
        (10, 1, 1),
        (3, 0.5, 1),
    ],
)
def test_a_limit_is_a_number_of_batches_or_a_part_of_them(length, limit, used):
    assert limited(length, limit, "limit_train_batches") == used


@pytest.mark.parametrize(
    ("length", "limit", "said"), [(None, 0.5, "has no length"), (3, 0.1, "less than one batch")]
)
def test_a_limit_that_means_no_batches_is_refused(length, limit, said):
    with pytest.raises(ConfigurationError, match=f"limit_val_batches={limit}.*{said}"):
        limited(length, limit, "limit_val_batches")


# Workers
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # from Python 3.12 on
def test_augmentation_in_workers_is_fixed_by_the_epoch():
    def loader():
        return DataLoader(
            Augmented(), batch_size=3, num_workers=2, shuffle=True, multiprocessing_context="fork"
        )

    def drawn(one, epoch):
        return torch.cat(list(one.open(epoch))).tolist()

    first = feed(loader())
    epochs = [drawn(first, 0), drawn(first, 1)]
    torch.manual_seed(99)
    torch.rand(3)
    assert drawn(feed(loader()), 1) == epochs[1]
    assert epochs[0] != epochs[1]


def test_tensors_reach_the_loop_as_the_loader_collates_them():
    data = TensorDataset(torch.arange(12.0).reshape(6, 2), torch.arange(6))
    features, targets = next(feed(DataLoader(data, batch_size=4)).open(0))
    assert features.shape == (4, 2)
    assert targets.tolist() == [0, 1, 2, 3]
