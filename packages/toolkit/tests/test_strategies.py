"""Strategies; rules S1 to S8 and S28 to S36 of docs/contracts/strategy.md."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from drivetrain_interfaces import (
    CheckpointError,
    Clip,
    ConfigurationError,
    Feature,
    ManualSpec,
    ModelState,
    StepSpec,
    Strategy,
    SupportsManualStep,
    UnsupportedError,
    World,
)
from torch import nn

from drivetrain_toolkit import specs
from drivetrain_toolkit.precision import (
    FullPrecision,
    ScaledAutocastPrecision,
    TruePrecision,
    make_precision,
)
from drivetrain_toolkit.strategies import (
    DDPStrategy,
    PipelineStrategy,
    SingleDeviceStrategy,
    TensorParallelStrategy,
)

BOTH = pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy(), DDPStrategy()], ids=["single", "ddp"]
)
TWO = World(rank=0, size=2, local_rank=0, local_size=2, address="127.0.0.1", port=1)


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **(tolerance or {"rtol": 1e-12, "atol": 1e-12})
        )


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def merged(*ranks):
    """The microbatches of several ranks as the big batches of one process."""
    return [
        tuple(torch.cat(part) for part in zip(*microbatches, strict=True))
        for microbatches in zip(*ranks, strict=True)
    ]


# One process.


@BOTH
def test_a_strategy_is_a_factory_and_stays_unbound(lab, strategy):
    """S1, S6"""
    bound = lab.bind(strategy)
    assert isinstance(bound, Strategy)
    assert isinstance(bound, SupportsManualStep)
    assert type(bound) is type(strategy)
    assert bound is not strategy
    assert bound.device == torch.device("cpu")
    for use in (lambda: strategy.device, lambda: strategy.prepare(nn.Linear(1, 1))):
        with pytest.raises(ConfigurationError, match="before it was bound"):
            use()
    assert type(pickle.loads(pickle.dumps(strategy))) is type(strategy)


def test_a_tied_parameter_stays_one_where_moving_makes_new_parameters(lab):
    """S4, S30"""
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    bound = lab.bind(SingleDeviceStrategy())
    bound._device = torch.device("meta")
    prepared = bound.prepare(module)
    assert prepared[2].weight is prepared[0].weight
    assert prepared[2].weight.device.type == "meta"
    assert [name for name, _ in prepared.named_parameters()] == ["0.weight", "0.bias", "2.bias"]


@BOTH
def test_a_strategy_without_a_module_has_no_state(lab, strategy):
    """S1"""
    with pytest.raises(ConfigurationError, match=r"Call prepare"):
        lab.bind(strategy).state()


def test_options_are_applied_to_the_copy_and_unknown_ones_refused(lab):
    """S2"""
    strategy = DDPStrategy(static_graph=True)
    bound = lab.bind(strategy, options={"find_unused_parameters": True})
    assert bound.ddp_kwargs["find_unused_parameters"]
    assert bound.ddp_kwargs["static_graph"]
    assert not strategy.ddp_kwargs["find_unused_parameters"]
    with pytest.raises(ConfigurationError, match=r"\['colour'\]; it takes .*'static_graph'"):
        lab.bind(strategy, options={"colour": 1})
    with pytest.raises(ConfigurationError, match=r"takes no options.*colour"):
        lab.bind(SingleDeviceStrategy(), options={"colour": 1})


def test_one_device_in_a_world_of_two_is_refused(lab):
    """S3"""
    with pytest.raises(UnsupportedError, match="world of 2"):
        lab.bind(SingleDeviceStrategy(), world=TWO)


@BOTH
def test_preparing_converts_and_returns_the_module_itself(lab, strategy):
    """S4"""
    module = nn.Linear(2, 2)
    assert lab.bind(strategy, TruePrecision("64-true")).prepare(module) is module
    assert module.weight.dtype is torch.float64


@BOTH
def test_batch_statistics_over_processes_are_refused_on_a_cpu(lab, strategy):
    """S5"""
    with pytest.raises(UnsupportedError, match="'cpu' devices"):
        lab.bind(strategy, sync_batchnorm=True).prepare(nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    "strategy",
    [PipelineStrategy(), TensorParallelStrategy(plan={"0": "colwise"})],
    ids=["pipeline", "tp"],
)
def test_ranks_that_share_the_work_on_a_batch_have_no_statistics_to_share(lab, strategy):
    """S5, B4: on any device"""
    with pytest.raises(UnsupportedError, match=r"Batch statistics .* '(pipeline|tp)'"):
        lab.bind(strategy, sync_batchnorm=True)


def test_a_pipeline_refuses_to_scale_losses_before_it_has_a_module(lab):
    """B4"""
    with pytest.raises(UnsupportedError, match=r"'16-mixed' scales the loss.*'pipeline'"):
        lab.bind(PipelineStrategy(), make_precision("16-mixed", "cpu"))


@BOTH
def test_feeding_moves_to_the_device(lab, strategy):
    """S7"""
    bound = lab.bind(strategy)
    batch = (torch.ones(2), torch.ones(2))
    assert bound.feed(batch) is batch
    bound._device = torch.device("meta")
    assert bound.feed({"x": batch})["x"][0].device.type == "meta"


@BOTH
def test_saving_and_loading_continues_bitwise(lab, strategy):
    """S28, S29"""

    def build():
        bound = lab.bind(
            strategy, ScaledAutocastPrecision("cpu", growth_interval=2, init_scale=64.0)
        )
        module = bound.prepare(lab.make_model(dtype=torch.float32))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        return bound, bound.train_step(StepSpec(module, [optimizer], lab.loss_of))

    data = [[tuple(part.float() for part in pair)] for pair in lab.make_data(0, 5)]
    first, step = build()
    for window in data[:3]:
        step(window)
    saved = first.state()
    for window in data[3:]:
        step(window)
    second, step = build()
    second.load(saved)
    for window in data[3:]:
        step(window)
    assert equal(first.state().module, second.state().module)
    assert first.state().precision == second.state().precision
    assert first.state().precision["scale"] == 256.0


@BOTH
def test_a_state_without_optimizers_loads_weights_alone(lab, strategy):
    """S31"""
    bound = lab.bind(strategy)
    module = bound.prepare(lab.make_model())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    bound.train_step(StepSpec(module, [optimizer], lab.loss_of))
    other = lab.make_model(seed=1)
    bound.load(ModelState(module=other.state_dict()))
    assert equal(module.state_dict(), other.state_dict())
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        bound.load(ModelState(module={}))
    bound.load(ModelState(module={}), strict=False)


@BOTH
def test_manual_optimizers_are_part_of_the_state(lab, strategy):
    """S28"""
    bound = lab.bind(strategy)
    module = bound.prepare(lab.make_model())
    optimizer = torch.optim.Adam(module.parameters())
    step = bound.manual_step(ManualSpec(module, [optimizer], lambda *_: None))
    step.backward(lab.loss_of(module, lab.make_data(0, 1)[0]))
    step.update(optimizer)
    assert "0.weight" in bound.state().optimizers[0]["state"]


@BOTH
def test_closing_releases_the_device_and_may_be_repeated(lab, strategy):
    """S35"""
    strategy.close()
    bound = lab.bind(strategy)
    bound.close()
    bound.close()
    assert bound.context.accelerator.closed == 2


def test_a_wrapper_that_a_world_of_one_does_not_use_is_a_warning(lab):
    """S36: but the plain strategy says nothing."""

    class Custom(DDPStrategy):
        def configure_ddp(self):
            raise AssertionError

    module = lab.make_model()
    spec = StepSpec(module, [torch.optim.SGD(module.parameters(), lr=0.1)], lab.loss_of)
    bound = lab.bind(Custom())
    with pytest.warns(UserWarning, match="wraps nothing in a world of one"):
        step = bound.train_step(spec)
    assert step(lab.make_data(0, 1)).applied
    lab.bind(DDPStrategy()).train_step(spec)


def test_the_wrapped_model_exists_only_with_a_step(lab):
    """S33"""
    bound = lab.bind(DDPStrategy())
    with pytest.raises(ConfigurationError, match="in configure_ddp"):
        assert bound.model
    assert bound.device_ids is None


def test_weights_with_a_static_graph_are_refused(lab):
    """S34"""
    bound = lab.bind(DDPStrategy(static_graph=True))
    module = lab.make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    spec = StepSpec(module, [optimizer], lab.loss_of, accumulate=2, weight=lambda _: 1.0)
    with pytest.raises(UnsupportedError, match="static_graph"):
        bound._no_sync(spec, None)


def test_declared_features_name_no_ability_that_depends_on_the_device():
    """S5"""
    assert Feature.SYNC_BATCHNORM not in specs.DDP_FEATURES
    assert {Feature.SEVERAL_PROCESSES} == specs.DDP_FEATURES - specs.SINGLE_DEVICE_FEATURES


def test_declaring_features_loads_no_torch():
    """S5: a backend's spec, which reads them, must be cheap to list."""
    program = "import sys, drivetrain_toolkit.specs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


# Two processes.


def test_two_ranks_train_as_one_process_with_big_batches(lab, two_ranks):
    """S17, S20, S34: weights, norms and tail windows; one reduction per window."""
    zero, one = two_ranks("training")
    assert equal(zero["module"], one["module"])
    bound = lab.bind(SingleDeviceStrategy())
    module = bound.prepare(lab.make_model(seed=0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    step = bound.train_step(
        StepSpec(module, [optimizer], lab.loss_of, accumulate=max(lab.WINDOWS), clip=lab.CLIP)
    )
    stream = iter(merged(*(lab.make_data(rank, sum(lab.WINDOWS)) for rank in range(2))))
    for index, count in enumerate(lab.WINDOWS):
        result = step([next(stream) for _ in range(count)])
        losses = [rank["windows"][index][0] for rank in (zero, one)]
        torch.testing.assert_close(result.loss, (losses[0] + losses[1]) / 2)
        for _, norm, applied, reductions in (zero["windows"][index], one["windows"][index]):
            torch.testing.assert_close(norm, result.grad_norm)
            assert applied
            assert reductions == 1
    close(zero["module"], dict(bound.state().module))


def test_ranks_start_from_the_weights_of_rank_0(lab, two_ranks):
    """S4"""
    expected = lab.make_model(seed=0).state_dict()
    assert all(equal(rank["start"], expected) for rank in two_ranks("training"))


def test_state_under_ddp_has_the_names_of_the_users_module(lab, two_ranks):
    """S28, S30"""
    names = set(lab.make_model().state_dict())
    for rank in two_ranks("training"):
        assert set(rank["module"]) == names
        assert set(rank["optimizer"]["state"]) == names


def test_options_of_the_wrapper_change_no_result(two_ranks):
    """S34: also a static graph, whose first backward must reduce."""
    for results in two_ranks("variants"):
        plain = results.pop("{}")
        for options, result in results.items():
            assert result.keys() == plain.keys(), options
            close(result, plain)


def test_weights_over_ranks_equal_one_big_batch(lab, two_ranks):
    """S18"""
    zero, one = two_ranks("weights_over_ranks")
    assert equal(zero, one)
    module = lab.make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    data = [lab.uneven(rank) for rank in range(2)]
    for part in (slice(None), slice(0, 1)):
        big = tuple(torch.cat(x) for x in zip(*data[0][part], *data[1][part], strict=True))
        lab.loss_of(module, big).backward()
        optimizer.step()
        optimizer.zero_grad()
    close(zero, module.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_closure_over_two_ranks_equals_one_process(lab, two_ranks):
    """S19"""
    (losses, zero), (_, one) = two_ranks("closure")
    assert equal(zero, one)
    bound = lab.bind(SingleDeviceStrategy())
    module = bound.prepare(lab.make_model())
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    step = bound.train_step(StepSpec(module, [optimizer], lab.loss_of, accumulate=2))
    data = merged(*(lab.make_data(rank, 4) for rank in range(2)))
    for window, loss in zip((data[:2], data[2:]), losses, strict=True):
        torch.testing.assert_close(step(window).loss, loss, rtol=1e-9, atol=0)
    close(zero, dict(bound.state().module), rtol=1e-8, atol=1e-8)


def test_a_manual_update_averages_over_ranks(lab, two_ranks):
    """S26: a gradient that one rank lacks counts as zero; one that all lack stays away."""
    zero, one = two_ranks("manual")
    assert equal(zero["state"], one["state"])
    module = lab.make_model()
    first = torch.optim.SGD(module[0].parameters(), lr=0.1)
    second = torch.optim.SGD(module[2].parameters(), lr=0.1, weight_decay=0.1)
    for index, pair in enumerate(zip(lab.make_data(0, 2), lab.make_data(1, 2), strict=True)):
        losses = []
        for rank, (features, targets) in enumerate(pair):
            hidden = module[1](module[0](features))
            out = module[2](hidden) if rank == 0 else hidden @ module[2].weight.t()
            losses.append((out - targets).square().mean())
        ((losses[0] + losses[1]) / 2).backward()
        norm = nn.utils.clip_grad_norm_(module[0].parameters(), lab.CLIP.value)
        torch.testing.assert_close(zero["norms"][index], norm)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    never = zero["state"].pop("never")
    assert torch.equal(never, torch.ones(2, dtype=torch.float64))  # not even decayed
    close(zero["state"], module.state_dict())


def test_configure_ddp_chooses_the_wrapper(lab, two_ranks):
    """S33"""
    module = lab.make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    big = merged(*(lab.make_data(rank, 1) for rank in range(2)))[0]
    lab.loss_of(module, big).backward()
    optimizer.step()
    for calls, state, broken in two_ranks("custom_wrapper"):
        assert calls == 1
        close(state, module.state_dict())
        assert "Broken.configure_ddp left a NoneType in self._model" in broken


def test_closing_takes_the_hooks_off_the_module(two_ranks):
    """S35: and a step that was replaced, or whose strategy is closed, says so."""
    for errors, closed in ((r[0], r[2]) for r in two_ranks("closing")):
        assert len(errors) == 2
        assert all("closed or had built another one" in error for error in errors)
        assert closed == 2
    assert [alone for _, alone, _ in two_ranks("closing")] == [True, False]


def test_evaluation_needs_no_other_rank(two_ranks):
    """S24"""
    assert two_ranks("evaluation") == ((4, 2), None)


def test_an_overflow_on_one_rank_is_an_overflow_on_all(two_ranks):
    """S23"""
    for rank in two_ranks("found_inf"):
        assert rank["applied"] == (True, False)
        assert rank["scale"] == 512.0
        assert equal(rank["before"][0], rank["after"][0])
        for name, values in rank["before"][1]["state"].items():
            assert equal(values, rank["after"][1]["state"][name])


def test_a_state_of_two_ranks_loads_in_one_process(lab, two_ranks):
    """S32: training goes on as it did there."""
    zero, one = two_ranks("state_moves_to_one_process")
    assert equal(zero["final"], one["final"])
    assert equal(zero["again"], zero["final"])
    bound = lab.bind(SingleDeviceStrategy(), FullPrecision())
    module = bound.prepare(lab.make_model(seed=5))
    optimizer = torch.optim.Adam(module.parameters())
    step = bound.train_step(StepSpec(module, [optimizer], lab.loss_of, clip=Clip(1e9)))
    weights, state = zero["saved"]
    bound.load(ModelState(module=weights, optimizers=[state]))
    step(lab.make_data(0, 2)[1:])
    close(dict(bound.state().module), zero["final"])
