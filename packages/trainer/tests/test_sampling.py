"""Which samples a rank sees: every one once per epoch, from any position, on any world size."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from drivetrain.sampling import DealtBatches, drawn_by, epoch_seed, in_sequence, shuffled

SIZES = [1, 2, 3, 7, 8, 9, 16, 31]
WORLDS = [1, 2, 3, 5]
BATCHES = [1, 2, 4]


def ranks(size, world, batch_size, *, drop_last=False, even=True, start=0, epoch=0, order=None):
    """What each rank sees: a list of batches per rank."""
    seen = []
    for rank in range(world):
        batches = DealtBatches(
            order or shuffled(size),
            size,
            batch_size,
            seed=7,
            rank=rank,
            world=world,
            drop_last=drop_last,
            even=even,
        )
        batches.epoch, batches.start = epoch, start
        seen.append(list(batches))
        assert len(batches) == len(seen[-1])
    return seen


def flat(seen):
    return [sample for batches in seen for batch in batches for sample in batch]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_sees_every_sample_exactly_once(size, batch_size, world):
    seen = ranks(size, world, batch_size, even=False)
    assert sorted(flat(seen)) == list(range(size))
    steps = [len(batches) for batches in seen]
    assert max(steps) - min(steps) <= 1
    assert all(0 < len(batch) <= batch_size for batches in seen for batch in batches)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_training_sees_every_sample_and_repeats_fewer_than_one_per_rank(size, batch_size, world):
    seen = ranks(size, world, batch_size)
    counts = Counter(flat(seen))
    assert set(counts) == set(range(size))
    assert counts.total() - size == -size % world
    # Ranks take the same number of steps, with batches of the same size: no collective waits.
    shapes = [[len(batch) for batch in batches] for batches in seen]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_drop_last_leaves_out_only_a_round_that_is_not_full(size, batch_size, world, even):
    seen = ranks(size, world, batch_size, drop_last=True, even=even)
    kept = size - size % (batch_size * world)
    assert sorted(flat(seen)) == sorted(shuffled(size)(7, 0)[:kept])
    assert all(len(batch) == batch_size for batches in seen for batch in batches)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("size", [1, 8, 25])
def test_an_epoch_continues_at_any_step(size, world, drop_last, even):
    asked = {"drop_last": drop_last, "even": even}
    whole = ranks(size, world, 2, **asked)
    for step in range(max(map(len, whole)) + 1):
        rest = ranks(size, world, 2, start=step * 2 * world, **asked)
        assert rest == [batches[step:] for batches in whole]


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 3), (5, 2), (3, 4)])
@pytest.mark.parametrize("size", [24, 29])
def test_another_world_size_sees_exactly_what_nobody_has_seen(size, old, new):
    for steps in range(1 + size // (2 * old)):
        before = flat([batches[:steps] for batches in ranks(size, old, 2, even=False)])
        after = flat(ranks(size, new, 2, even=False, start=steps * 2 * old))
        assert sorted(before + after) == list(range(size))


def test_a_position_past_the_end_is_an_empty_rest():
    assert ranks(10, 2, 3, start=12) == [[], []]


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    order = shuffled(50)
    first = order(3, 1)
    torch.rand(5)
    random.random()
    assert order(3, 1) == first
    assert order(3, 2) != first
    assert order(4, 1) != first
    assert sorted(first) == list(range(50))


def test_orders_do_not_touch_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    shuffled(50)(3, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_neighbouring_epochs_and_runs_have_nothing_in_common():
    seeds = [epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert epoch_seed(1, 23) != epoch_seed(12, 3)


def test_without_shuffling_samples_are_dealt_like_cards():
    assert ranks(8, 2, 2, order=in_sequence(8)) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert in_sequence(3)(1, 0) == in_sequence(3)(2, 9) == [0, 1, 2]


# Samplers of users
class NumpySampler:
    """Draws from a global generator that is not torch's."""

    def __iter__(self):
        return iter(np.random.permutation(40).tolist())

    def __len__(self):
        return 40


class PythonSampler(NumpySampler):
    def __iter__(self):
        return iter(random.sample(range(40), 40))


class EpochSampler(NumpySampler):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([(n + self.epoch) % 40 for n in range(40)])


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler([1.0, 2.0, 3.0] * 10, 40),
    "own generator": lambda: WeightedRandomSampler([1.0] * 30, 40, generator=torch.Generator()),
    "replacement": lambda: RandomSampler(range(40), replacement=True),
    "subset": lambda: SubsetRandomSampler(range(10, 50)),
    "numpy": NumpySampler,
    "python": PythonSampler,
    "epoch": EpochSampler,
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_a_sampler_of_ones_own_draws_the_same_on_every_rank_and_after_a_resume(make):
    first, second = drawn_by(make()), drawn_by(make())
    orders = [first(3, epoch) for epoch in range(3)]
    torch.rand(3), random.random(), np.random.random()
    assert [second(3, epoch) for epoch in (2, 1, 0)] == orders[::-1]
    assert orders[0] != orders[1] != orders[2]
    assert [len(order) for order in orders] == [40] * 3


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_drawing_from_it_leaves_every_generator_as_it_was(make):
    sampler = make()
    generator = getattr(sampler, "generator", None)

    def states():
        yield torch.get_rng_state().tolist()
        yield random.getstate()
        yield np.random.get_state()[1].tolist()
        yield None if generator is None else generator.get_state().tolist()

    before = list(states())
    drawn_by(sampler)(3, 1)
    assert list(states()) == before


def test_a_sampler_that_raises_leaves_every_generator_as_it_was():
    class Broken:
        def __iter__(self):
            torch.rand(1)
            raise RuntimeError("broken")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        drawn_by(Broken())(0, 0)
    assert torch.equal(torch.get_rng_state(), before)
