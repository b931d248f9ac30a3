"""torch_xla's FSDP for processes, in the world of one that its runtime for CPUs has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from drivetrain_interfaces import (
    CheckpointError,
    Clip,
    ConfigurationError,
    EvalSpec,
    ManualSpec,
    Shard,
    UnsupportedError,
    World,
)
from torch import nn

from drivetrain_xla import monitor
from drivetrain_xla.fsdp1 import Parts, ShardedReplicaStrategy


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.last(self.first(x).tanh()))


class Divided(ShardedReplicaStrategy):
    """Divides in a world of one too, with all that torch_xla's FSDP does."""

    _least = 1


def bind(lab, name="fsdp1", precision="32-true"):
    if name != "fsdp1":
        return lab.bind(name, precision)
    lab.bound.append(Divided()(lab.context(precision)))
    return lab.bound[-1]


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].cpu(), value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [None, Tied])
def test_training_is_that_of_one_device(lab, by_hand, model):
    torch.manual_seed(0)
    module = lab.model() if model is None else model()
    reference = lab.model() if model is None else model()
    reference.load_state_dict(module.state_dict())
    batches = lab.batches(6)
    strategy = bind(lab, "fsdp1")
    losses, trained = lab.train(strategy, batches, model=module)
    wanted, reference = by_hand(reference, batches)
    assert losses == pytest.approx(wanted, abs=1e-5)
    equal(strategy.state().module, reference.state_dict())
    strategy.close()
    assert type(trained) is type(reference)
    equal(trained.state_dict(), reference.state_dict())
    batch = batches[0][0]
    torch.testing.assert_close(
        trained(batch.to("xla")).cpu(), reference(batch), atol=1e-5, rtol=1e-4
    )


def test_windows_and_clipping_are_those_of_one_device(lab):
    batches = lab.batches(6)
    states = []
    for name in ("fsdp1", "single_device"):
        strategy = bind(lab, name)
        _, _, step = lab.build(strategy, accumulate=3, clip=Clip(0.1))
        fed = [strategy.feed(batch) for batch in batches]
        with step:
            norms = [float(step(fed[first : first + 3]).grad_norm) for first in (0, 3)]
        states.append((norms, strategy.state().module))
    assert states[0][0] == pytest.approx(states[1][0], abs=1e-6)
    equal(*(state for _, state in states))


def test_autocast_is_close(lab, by_hand):
    batches = lab.batches(6)
    losses, _ = lab.train(bind(lab, "fsdp1", "bf16-mixed"), batches)
    assert losses == pytest.approx(by_hand(lab.model(), batches)[0], abs=3e-2)


def test_a_step_is_one_sync_and_reads_nothing(lab):
    strategy = bind(lab, "fsdp1")
    _, _, step = lab.build(strategy)
    batches = [strategy.feed(batch) for batch in lab.batches(8)]
    with step:
        for batch in batches[:3]:
            step([batch])
        before = monitor.counts()
        for batch in batches[3:]:
            step([batch])
        found = monitor.counts() - before
    assert (found.syncs, found.read_back, found.compiled) == (5, 0, 0)


def test_evaluation_between_steps_sees_the_whole_module(lab, by_hand):
    strategy = bind(lab, "fsdp1")
    module, _, step = lab.build(strategy)
    batches = [strategy.feed(batch) for batch in lab.batches(4)]
    wanted, _ = by_hand(lab.model(), lab.batches(4))
    evaluate = strategy.eval_step(EvalSpec(module, lab.loss, inference_mode=False))
    with step:
        for batch, loss in zip(batches, wanted, strict=True):
            with evaluate:
                before = float(evaluate(batch))
            assert float(step([batch]).loss) == pytest.approx(before, abs=1e-6)
            assert before == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("other", ["single_device", "zero1"])
def test_a_state_goes_on_elsewhere_and_comes_back(lab, other):
    batches = lab.batches(6)
    strategy = bind(lab, "fsdp1")
    _, _, step = lab.build(strategy)
    with step:
        for batch in batches[:3]:
            step([strategy.feed(batch)])
    state = strategy.state()
    again = bind(lab, other)
    _, _, step = lab.build(again, model=lab.model(5))
    again.load(state)
    back = bind(lab, "fsdp1")
    _, _, last = lab.build(back, model=lab.model(7))
    back.load(again.state())
    final = back.state()
    for name, value in state.module.items():
        assert torch.equal(final.module[name], value)
    for name, kept in state.optimizers[0]["state"].items():
        for key, value in kept.items():
            assert torch.equal(final.optimizers[0]["state"][name][key], value)
    with step, last:
        for batch in batches[3:]:
            ends = [float(s([a.feed(batch)]).loss) for s, a in ((step, again), (last, back))]
            assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_a_module_is_prepared_again(lab):
    batches = lab.batches(4)
    module = lab.model()
    lab.train(bind(lab, "fsdp1"), batches[:2], model=module)
    losses, _ = lab.train(bind(lab, "single_device"), batches[2:], model=module)
    other = lab.model()
    lab.train(bind(lab, "single_device"), batches[:2], model=other)
    wanted, _ = lab.train(bind(lab, "fsdp1"), batches[2:], model=other)
    assert losses == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_make_up_the_whole(size):
    """Of every number of ranks, which no CPU runtime has."""
    whole = {"a": torch.arange(30.0).view(5, 6), "b": torch.arange(2.0), "n": torch.tensor(3)}
    covered = {name: torch.zeros_like(value) for name, value in whole.items()}
    for rank in range(size):
        parts = object.__new__(Parts)
        parts.rank, parts.root = rank, SimpleNamespace(world_size=size)
        parts._shapes = {"a": (5, 6), "b": (2,)}
        for name, value in whole.items():
            mine = parts.part(name, value)
            placed = parts.placed(name, mine)
            if name == "n":
                assert mine is value
                continue
            assert mine.shape[0] == -(-value.shape[0] // size)
            assert type(placed) is Shard
            assert placed.shape == tuple(value.shape)
            rows = placed.data.shape[0]
            covered[name][placed.start[0] : placed.start[0] + rows] += placed.data
    assert torch.equal(covered["a"], whole["a"])
    assert torch.equal(covered["b"], whole["b"])


def test_alone_nothing_is_divided(lab, by_hand):
    batches = lab.batches(3)
    strategy = lab.bind("fsdp1")
    losses, module = lab.train(strategy, batches)
    assert losses == pytest.approx(by_hand(lab.model(), batches)[0], abs=1e-5)
    state = strategy.state()
    strategy.load(state)
    equal(module.state_dict(), state.module)


def test_processes_that_the_runtime_does_not_know_are_refused(lab):
    world = World(0, 2, 0, 2, address="127.0.0.1", port=1)
    with pytest.raises(UnsupportedError, match=r"2 processes which XLA's runtime does not know"):
        ShardedReplicaStrategy()(replace(lab.context(), world=world))


def test_what_it_does_not_take_is_refused(lab):
    with pytest.raises(UnsupportedError, match="'bf16-true', and it holds float32"):
        lab.bind("fsdp1", "bf16-true")
    strategy = bind(lab, "fsdp1")
    with pytest.raises(UnsupportedError, match=r"weight: float64 of shape \(2, 4\)"):
        strategy.prepare(nn.Linear(4, 2).double())
    lone = nn.Module()
    lone.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UnsupportedError, match="scale: one number"):
        strategy.prepare(lone)
    module = lab.model()
    early = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="before"):
        lab.build(strategy, model=module, optimizer=lambda _: early)
    with pytest.raises(UnsupportedError, match="manual step"):
        strategy.manual_step(ManualSpec(module, print, (early,)))


def test_a_checkpoint_of_other_shapes_is_refused(lab):
    strategy = bind(lab, "fsdp1")
    lab.build(strategy)
    state = strategy.state()
    wrong = {**state.module, "0.bias": torch.zeros(9)}
    with pytest.raises(CheckpointError, match=r"0.bias \(\(9,\) in the checkpoint, \(8,\) here\)"):
        strategy.load(replace(state, module=wrong))
