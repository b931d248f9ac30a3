"""Training on one device: against the CPU, and what it compiles, computes and transfers."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch_xla.debug.metrics as met
from drivetrain_interfaces import (
    Clip,
    ConfigurationError,
    EvalSpec,
    ManualSpec,
    UnsupportedError,
)
from torch import nn
from torch_xla.amp import syncfree

from drivetrain_xla.compilations import RecompilationWarning, compilations


def test_training_is_that_of_the_cpu(lab, by_hand):
    batches = lab.batches(20)
    losses, module = lab.train(lab.bind(), batches)
    wanted, reference = by_hand(lab.model(), batches)
    assert losses == pytest.approx(wanted, abs=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name].cpu(), value, atol=1e-5, rtol=1e-4)


def test_a_run_compiles_twice_and_reads_nothing_back(lab):
    strategy = lab.bind()
    _, _, step = lab.build(strategy, clip=Clip(1.0))
    batches = [strategy.feed(batch) for batch in lab.batches(12)]
    met.clear_all()
    with step:
        results = [step([batch]) for batch in batches]
    assert compilations() == 2
    assert met.counter_value("MarkStep") == 12
    assert met.metric_data("TransferFromDeviceTime") is None
    assert all(result.applied for result in results)


def test_a_window_is_one_graph(lab, by_hand):
    strategy = lab.bind()
    _, _, step = lab.build(strategy, accumulate=3)
    batches = [strategy.feed(batch) for batch in lab.batches(12)]
    met.clear_all()
    with step:
        for first in range(0, 12, 3):
            step(batches[first : first + 3])
    assert compilations() == 2
    assert met.counter_value("MarkStep") == 4


def test_shapes_that_change_all_the_time_are_told(lab):
    strategy = lab.bind()
    model = nn.Sequential(nn.Linear(4, 37), nn.Linear(37, 2))  # no other test has compiled it
    _, _, step = lab.build(strategy, model=model)

    def train():
        for rows in range(2, 8):
            step([strategy.feed(lab.batches(1, rows=rows)[0])])

    with pytest.warns(RecompilationWarning, match=r"\[6, 4\].* after .*\[5, 4\]") as seen:
        train()
    assert len(seen) == 1, "told once"
    assert len(step.watch.shapes) == 6


def test_values_in_the_graph_are_told(lab):
    """A loss that Python code computes from something that changes."""
    strategy = lab.bind()
    turns = iter(range(100))

    def loss(module, batch):
        value = lab.loss(module, batch)
        for _ in range(next(turns)):
            value = value.sin()
        return value

    _, _, step = lab.build(strategy, loss=loss)
    batch = strategy.feed(lab.batches(1)[0])

    def train():
        for _ in range(9):
            step([batch])

    with pytest.warns(RecompilationWarning, match="the same shape"):
        train()


def test_whole_batches_and_the_last_one_are_no_reason_to_warn(lab):
    strategy = lab.bind()
    _, _, step = lab.build(strategy)
    whole, last = (strategy.feed(lab.batches(1, rows=rows)[0]) for rows in (8, 3))
    with step, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for batch in (whole, whole, last):
                step([batch])


def test_a_tied_parameter_stays_one(lab):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.other.weight = self.one.weight

        def forward(self, x):
            return self.other(self.one(x))[:, :2]

    _, module = lab.train(lab.bind(), lab.batches(3), model=Tied())
    assert module.one.weight is module.other.weight


def test_evaluation_is_one_graph(lab):
    strategy = lab.bind()
    module, _, _ = lab.build(strategy)
    spec = EvalSpec(module, lab.loss, inference_mode=False)
    batch = strategy.feed(lab.batches(1)[0])
    with strategy.eval_step(spec) as step:
        step(batch)
        met.clear_all()
        step(batch)
    assert compilations() == 0
    assert met.counter_value("MarkStep") == 1


def test_an_update_by_hand_is_computed_at_once(lab):
    strategy = lab.bind()
    module = strategy.prepare(lab.model())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = strategy.feed(lab.batches(1)[0])
    with strategy.manual_step(ManualSpec(module, [optimizer], lab.loss)) as step:
        met.clear_all()
        step.backward(step(batch))
        assert step.update(optimizer).applied
    assert met.counter_value("MarkStep") == 1


def test_dropout_follows_the_seed(lab):
    def run(seed):
        model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 2))
        model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
        torch.manual_seed(seed)
        return lab.train(lab.bind(), lab.batches(3), model=model)[0]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers_of_torch_xla_train_alike(lab, name):
    batches = lab.batches(6)
    losses = [
        lab.train(
            lab.bind(), batches, optimizer=lambda p, kind=kind: getattr(kind, name)(p, lr=0.05)
        )[0]
        for kind in (torch.optim, syncfree)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_fused_optimizer_is_refused_by_name(lab):
    with pytest.raises(UnsupportedError, match=r"AdamW\(fused=True\)"):
        lab.build(lab.bind(), optimizer=lambda p: torch.optim.AdamW(p, fused=True))


def test_an_optimizer_from_before_the_move_is_refused(lab):
    """It would update parameters that are none of the module's, and nobody would notice."""
    model = lab.model()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="4 of its parameters"):
        lab.build(lab.bind(), model=model, optimizer=lambda _: early)


def test_synchronized_batch_statistics_are_refused(lab):
    from dataclasses import replace

    strategy = lab.backend.strategy("single_device", replace(lab.context(), sync_batchnorm=True))
    with pytest.raises(UnsupportedError, match="layer normalization"):
        strategy.prepare(nn.BatchNorm1d(4))
