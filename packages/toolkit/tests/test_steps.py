"""The eager steps against hand-written loops; rules S9 to S27 of docs/contracts/strategy.md."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from drivetrain_interfaces import (
    Clip,
    ConfigurationError,
    DataError,
    EvalSpec,
    ManualSpec,
    ReduceOp,
    StepHooks,
    StepSpec,
    TrainStep,
    UnsupportedError,
    UserCodeError,
)
from torch import nn

from drivetrain_toolkit.precision import FullPrecision, ScaledAutocastPrecision, make_precision
from drivetrain_toolkit.steps import (
    ClosureTrainStep,
    EagerEvalStep,
    EagerManualStep,
    EagerTrainStep,
    make_train_step,
)


class Doubled:
    """Collectives of two ranks that hold the same: what a rank sees without another process."""

    def __init__(self):
        self.reduced = []

    def all_reduce(self, tensor, op=ReduceOp.SUM):
        self.reduced.append((tensor.clone(), op))
        return tensor * 2 if op is ReduceOp.SUM else tensor.clone()


def build(lab, optimizer=torch.optim.SGD, *, precision=None, step=None, seed=0, **kwargs):
    """A module, its optimizer, and a step over both."""
    module = lab.make_model(seed)
    made = optimizer(module.parameters(), lr=0.1)
    spec = StepSpec(module, [made], lab.loss_of, **kwargs)
    return module, made, make_train_step(spec, precision or FullPrecision(), **(step or {}))


def same(module, reference):
    return all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True)
    )


def close(module, reference):
    for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Lazy:
    """A window that records when each microbatch is drawn."""

    def __init__(self, items, log, length=None):
        self._items = items
        self._log = log
        self._length = len(items) if length is None else length

    def __len__(self):
        return self._length

    def __contains__(self, item):
        return item in self._items

    def __iter__(self):
        for index, item in enumerate(self._items):
            self._log.append(f"draw {index}")
            yield item


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_equals_a_hand_written_loop_bitwise(lab, optimizer):
    """S9"""
    module, _, step = build(lab, optimizer)
    reference = lab.make_model()
    other = optimizer(reference.parameters(), lr=0.1)
    assert type(step) is EagerTrainStep
    assert isinstance(step, TrainStep)
    with step:
        for microbatch in lab.make_data(0, 5):
            result = step([microbatch])
            loss = lab.loss_of(reference, microbatch)
            loss.backward()
            other.step()
            other.zero_grad(set_to_none=True)
            assert torch.equal(result.loss, loss)
            assert not result.loss.requires_grad
            assert result.applied is True
            assert result.grad_norm is None
    assert same(module, reference)


@pytest.mark.parametrize("count", [1, 2, 3], ids=["tail of 1", "tail of 2", "full"])
def test_a_window_equals_one_big_batch_also_when_it_is_a_tail(lab, count):
    """S17: what is divided by is what the window really holds."""
    module, _, step = build(lab, accumulate=3)
    reference = lab.make_model()
    data = lab.make_data(0, count)
    result = step(data)
    big = tuple(torch.cat(part) for part in zip(*data, strict=True))
    loss = lab.loss_of(reference, big)
    loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    close(module, reference)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)


def test_one_microbatch_is_not_multiplied(lab):
    """S17: so that accumulation that is never used changes no bit."""
    microbatch = lab.make_data(0, 1)
    one, _, plain = build(lab)
    two, _, weighted = build(lab, accumulate=4, weight=lambda _: 0.3)
    plain(microbatch)
    weighted(microbatch)
    assert same(one, two)


@pytest.mark.parametrize("sizes", [(1, 5, 2), (4, 1), (3, 3, 3, 1)])
def test_weights_make_uneven_microbatches_equal_one_big_batch(lab, sizes):
    """S18"""
    data = [lab.make_data(index, 1, rows=rows)[0] for index, rows in enumerate(sizes)]
    module, _, step = build(lab, accumulate=len(sizes), weight=lambda b: float(len(b[0])))
    reference = lab.make_model()
    result = step(data)
    big = tuple(torch.cat(part) for part in zip(*data, strict=True))
    loss = lab.loss_of(reference, big)
    loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    close(module, reference)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)


def test_microbatches_of_weight_zero_count_for_nothing(lab):
    """S18"""
    data = lab.make_data(0, 3)
    weights = iter([0.0, 2.0, 0.0])
    module, _, step = build(lab, accumulate=3, weight=lambda _: next(weights))
    result = step(data)
    reference, _, plain = build(lab)
    expected = plain(data[1:2])
    close(module, reference)
    torch.testing.assert_close(result.loss, expected.loss)


def test_weights_that_cannot_be_are_refused(lab):
    """S18"""
    data = lab.make_data(0, 2)
    _, _, step = build(lab, accumulate=2, weight=lambda _: 0.0)
    with pytest.raises(DataError, match="are zero"):
        step(data)
    _, _, step = build(lab, accumulate=2, weight=lambda _: -1.0)
    with pytest.raises(UserCodeError, match=r"-1\.0"):
        step(data)


def test_weights_over_ranks_divide_by_the_total_of_all(lab):
    """S18: one reduction per window, also for a window of one, which another rank may not have."""
    ranks = Doubled()
    module, _, step = build(
        lab,
        accumulate=2,
        weight=lambda b: float(len(b[0])),
        weight_over_ranks=True,
        step={"collectives": ranks, "world_size": 2},
    )
    reference, _, plain = build(lab, accumulate=2, weight=lambda b: float(len(b[0])))
    data = lab.uneven(0)
    for window in (data[:2], data[2:]):
        step(window)
        plain(window)
    # Float32 on the device is enough for a count; two equal ranks must come out as one.
    for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert [(t.item(), op) for t, op in ranks.reduced] == [(6.0, ReduceOp.SUM), (2.0, ReduceOp.SUM)]


def test_microbatches_are_drawn_when_they_are_used(lab):
    """S14"""
    log = []
    hooks = StepHooks(before_backward=lambda loss: log.append("backward"))
    _, _, step = build(lab, accumulate=3, hooks=hooks)
    step(Lazy(lab.make_data(0, 3), log))
    step(Lazy(lab.make_data(0, 1), log))
    assert log == [*(w for i in range(3) for w in (f"draw {i}", "backward")), "draw 0", "backward"]


def test_hooks_come_in_order_around_what_they_are_named_after(lab):
    """S10"""
    log = []
    optimizers = []

    def before_step(given):
        assert list(given) == optimizers
        log.append("before_optimizer_step")

    module = lab.make_model()
    weight = module[0].weight

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            log.append("step")
            return super().step(closure)

        def zero_grad(self, set_to_none=True):
            log.append("zero_grad")
            assert set_to_none
            super().zero_grad(set_to_none)

    optimizers.append(Recorder(module.parameters(), lr=0.1))
    hooks = StepHooks(
        before_backward=lambda loss: log.append(
            ("before_backward", loss.item(), weight.grad is None)
        ),
        after_backward=lambda: log.append(("after_backward", weight.grad is not None)),
        before_optimizer_step=before_step,
        before_zero_grad=lambda given: log.append(("before_zero_grad", list(given) == optimizers)),
    )

    @contextmanager
    def no_sync():
        log.append("no_sync on")
        yield
        log.append("no_sync off")

    data = lab.make_data(0, 2)
    losses = [lab.loss_of(module, microbatch).item() for microbatch in data]
    step = make_train_step(
        StepSpec(module, optimizers, lab.loss_of, accumulate=2, hooks=hooks),
        FullPrecision(),
        no_sync=no_sync,
    )
    step(data)
    assert log == [
        "no_sync on",
        ("before_backward", losses[0], True),
        ("after_backward", True),
        "no_sync off",
        ("before_backward", losses[1], False),
        ("after_backward", True),
        "before_optimizer_step",
        "step",
        ("before_zero_grad", True),
        "zero_grad",
    ]


def test_the_hook_before_the_update_sees_unclipped_gradients_and_may_change_them(lab):
    """S10"""
    seen = []
    module = lab.make_model()

    def before_step(_):
        seen.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]))
        for parameter in module.parameters():
            parameter.grad.mul_(2)

    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    hooks = StepHooks(before_optimizer_step=before_step)
    spec = StepSpec(module, [optimizer], lab.loss_of, clip=Clip(1e-3), hooks=hooks)
    result = make_train_step(spec, FullPrecision())(lab.make_data(0, 1))
    torch.testing.assert_close(result.grad_norm, seen[0] * 2)


@pytest.mark.parametrize("clip", [Clip(0.05), Clip(0.01, by="value")], ids=["norm", "value"])
def test_clipping_equals_a_hand_written_loop(lab, clip):
    """S20, S21"""
    module, _, step = build(lab, clip=clip)
    reference = lab.make_model()
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for microbatch in lab.make_data(0, 3):
        result = step([microbatch])
        lab.loss_of(reference, microbatch).backward()
        if clip.by == "norm":
            norm = nn.utils.clip_grad_norm_(reference.parameters(), clip.value)
            torch.testing.assert_close(result.grad_norm, norm)
        else:
            nn.utils.clip_grad_value_(reference.parameters(), clip.value)
            assert result.grad_norm is None
        other.step()
        other.zero_grad()
    close(module, reference)


def test_several_optimizers_update_on_one_loss_and_share_one_norm(lab):
    """S20, S23"""
    module, reference = lab.make_model(), lab.make_model()
    optimizers = [
        torch.optim.SGD(module[0].parameters(), lr=0.1),
        torch.optim.Adam(module[2].parameters()),
    ]
    others = [
        torch.optim.SGD(reference[0].parameters(), lr=0.1),
        torch.optim.Adam(reference[2].parameters()),
    ]
    step = make_train_step(
        StepSpec(module, optimizers, lab.loss_of, clip=Clip(0.1)), FullPrecision()
    )
    for microbatch in lab.make_data(0, 3):
        result = step([microbatch])
        lab.loss_of(reference, microbatch).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        for other in others:
            other.step()
            other.zero_grad()
        torch.testing.assert_close(result.grad_norm, norm)
    close(module, reference)


def test_a_step_that_is_not_applied_moves_nothing_and_clears(lab):
    """S11, S15"""
    log = []
    module = lab.make_model(dtype=torch.float32)
    optimizer = torch.optim.Adam(module.parameters())
    hooks = StepHooks(before_zero_grad=lambda _: log.append("before_zero_grad"))
    step = make_train_step(
        StepSpec(module, [optimizer], lab.loss_of, accumulate=2, clip=Clip(1.0), hooks=hooks),
        ScaledAutocastPrecision("cpu", init_scale=256.0),
    )
    features, targets = (part.float() for part in lab.make_data(0, 1)[0])
    assert step([(features, targets)]).applied
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    result = step([(features, targets), (features * torch.inf, targets)])
    assert result.applied is False
    assert not result.grad_norm.isfinite()
    after = (module.state_dict(), optimizer.state_dict()["state"])
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name])
    for index, state in before[1].items():
        assert all(torch.equal(value, after[1][index][key]) for key, value in state.items())
    assert all(p.grad is None for p in module.parameters())
    assert log == ["before_zero_grad", "before_zero_grad"]


def test_scaled_accumulation_with_clipping_equals_a_hand_written_scaler(lab):
    """S9, S17, S20"""
    module, reference = (lab.make_model(dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = make_train_step(
        StepSpec(module, [optimizer], lab.loss_of, accumulate=2, clip=Clip(0.1)),
        ScaledAutocastPrecision("cpu", init_scale=256.0),
    )
    data = [tuple(part.float() for part in pair) for pair in lab.make_data(0, 4)]
    for window in (data[:2], data[2:]):
        step(window)
        for microbatch in window:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = lab.loss_of(reference, microbatch)
            scaler.scale(loss * 0.5).backward()
        scaler.unscale_(other)
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (None, "The loss is None"),
        (1.5, "a float, not a tensor"),
        ({"loss": torch.ones(())}, "a dict, not a tensor"),
        (torch.ones(3, 2), r"shape \(3, 2\)"),
        (torch.ones(0), r"shape \(0,\)"),
        (torch.ones(()), "does not require a gradient"),
    ],
    ids=["None", "number", "dict", "matrix", "empty", "no gradient"],
)
def test_a_loss_that_cannot_be_trained_on_is_explained(lab, loss, said):
    """S12"""
    module = lab.make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = make_train_step(StepSpec(module, [optimizer], lambda *_: loss), FullPrecision())
    with pytest.raises(UserCodeError, match=said) as caught:
        step([0])
    assert caught.value.hint
    manual = EagerManualStep(ManualSpec(module, [optimizer], lambda *_: None), FullPrecision())
    with pytest.raises(UserCodeError, match=said):
        manual.backward(loss)


def test_a_loss_of_one_element_is_a_scalar(lab):
    """S12"""
    module = lab.make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    spec = StepSpec(module, [optimizer], lambda m, b: lab.loss_of(m, b).reshape(1, 1))
    result = make_train_step(spec, FullPrecision())(lab.make_data(0, 1))
    assert result.loss.shape == ()


@pytest.mark.parametrize(("count", "hint"), [(0, "Skip empty"), (3, "at most")])
def test_windows_that_are_empty_or_too_long_are_refused(lab, count, hint):
    """S13"""
    _, _, step = build(lab, accumulate=2)
    with pytest.raises(DataError, match=f"window of {count} microbatches.*1 to 2.*{hint}"):
        step(lab.make_data(0, count))


@pytest.mark.parametrize(("items", "length"), [(0, 1), (2, 1), (1, 2), (3, 2)])
def test_a_window_that_yields_another_number_than_its_length_is_refused(lab, items, length):
    """S13: ranks average at the last microbatch, so it must be known."""
    module, _, step = build(lab, accumulate=4)
    before = copy.deepcopy(module)
    with pytest.raises(DataError, match=f"holds {length} microbatches"):
        step(Lazy(lab.make_data(0, items), [], length))
    assert same(module, before)


def test_gradients_of_a_window_that_failed_do_not_reach_the_next(lab):
    """S11"""
    module, _, step = build(lab, accumulate=2)
    reference, _, other = build(lab, accumulate=2)
    data = lab.make_data(0, 3)
    with pytest.raises(ValueError, match="not enough values"):
        step([data[0], ()])
    step(data[1:])
    other(data[1:])
    assert same(module, reference)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"optimizers": []}, ConfigurationError, "without an optimizer"),
        ({"accumulate": 0}, ConfigurationError, "accumulate=0"),
        ({"clip": Clip(0.0)}, ConfigurationError, "positive"),
        ({"clip": Clip(1.0, by="sum")}, UnsupportedError, "'sum'"),
    ],
    ids=["no optimizer", "accumulate", "limit", "way of clipping"],
)
def test_specs_that_cannot_be_met_are_refused_when_the_step_is_built(lab, change, error, said):
    """S22"""
    module = lab.make_model()
    fields = {"optimizers": [torch.optim.SGD(module.parameters(), lr=0.1)]} | change
    with pytest.raises(error, match=said):
        make_train_step(StepSpec(module, loss=lab.loss_of, **fields), FullPrecision())


def test_optimizers_that_share_a_parameter_are_refused_with_a_scale(lab):
    """S22: the shared gradient would be unscaled twice."""
    module = lab.make_model()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]
    spec = StepSpec(module, optimizers, lab.loss_of)
    make_train_step(spec, FullPrecision())
    with pytest.raises(UnsupportedError, match="share a parameter"):
        make_train_step(spec, ScaledAutocastPrecision("cpu"))


def test_a_scheduler_that_counts_updates_is_not_bypassed(lab):
    """S9: torch warns, here an error, if a scheduler steps before an optimizer that it wraps."""
    _, optimizer, step = build(lab)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(lab.make_data(0, 1))
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]


def test_parameters_added_to_an_optimizer_later_take_part(lab):
    """S20"""
    module = lab.make_model()
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.0)
    step = make_train_step(
        StepSpec(module, [optimizer], lab.loss_of, clip=Clip(1.0)), FullPrecision()
    )
    data = lab.make_data(0, 1)
    before = step(data).grad_norm
    module.zero_grad()
    optimizer.add_param_group({"params": module[2].parameters()})
    assert step(data).grad_norm > before


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip": Clip(1.0)},
        {"clip": Clip(1.0, by="value")},
        {"weight": lambda b: float(len(b[0]))},
        {"weight": lambda b: float(len(b[0])), "weight_over_ranks": True},
    ],
    ids=["plain", "norm", "value", "weights", "weights over ranks"],
)
def test_a_step_does_not_wait_for_the_device(lab, change):
    """S16: on the meta device, reading a number back is an error."""
    module = lab.make_model().to("meta")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    step = make_train_step(
        StepSpec(module, [optimizer], lab.loss_of, accumulate=3, **change),
        FullPrecision(),
        collectives=Doubled(),
        world_size=2,
    )
    data = [tuple(part.to("meta") for part in pair) for pair in lab.make_data(0, 3)]
    for window in (data, data[:1]):
        result = step(window)
        assert result.applied
        assert result.loss.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        result.loss.item()


def test_a_released_step_says_that_it_is_over(lab):
    """S35"""
    _, _, step = build(lab)
    step.release()
    with pytest.raises(UserCodeError, match="closed"):
        step(lab.make_data(0, 1))


def lbfgs(parameters, lr):
    return torch.optim.LBFGS(parameters, lr=lr, max_iter=3)


def test_an_optimizer_with_a_closure_equals_a_hand_written_loop(lab):
    """S19"""
    module, _, step = build(lab, lbfgs, accumulate=2)
    assert type(step) is ClosureTrainStep
    reference = lab.make_model()
    other = lbfgs(reference.parameters(), 0.1)
    data = lab.make_data(0, 3)
    for window in (data[:2], data[2:]):
        first = []

        def closure(window=window, first=first):
            other.zero_grad()
            total = 0
            for microbatch in window:
                loss = lab.loss_of(reference, microbatch) * (1 / len(window))
                loss.backward()
                total = total + loss.detach()
            first.append(total)
            return total

        other.step(closure)
        log = []
        result = step(Lazy(window, log))
        assert torch.equal(result.loss, first[0])
        assert result.applied
        assert log == [f"draw {index}" for index in range(len(window))]
    assert same(module, reference)
    assert all(p.grad is None for p in module.parameters())


def test_each_evaluation_of_a_closure_clips_and_calls_hooks(lab):
    """S19"""
    log = []
    hooks = StepHooks(
        before_optimizer_step=lambda _: log.append("step"),
        before_zero_grad=lambda _: log.append("zero"),
    )
    _, _, step = build(lab, lbfgs, hooks=hooks, clip=Clip(1e-3))
    result = step(lab.make_data(0, 1))
    assert log.count("zero") == 1
    assert log.count("step") > 1
    assert result.grad_norm > 1e-3


def test_a_closure_is_refused_with_a_scale_and_beside_other_optimizers(lab):
    """S19"""
    module = lab.make_model()
    made = lbfgs(module[0].parameters(), 0.1)
    with pytest.raises(UnsupportedError, match=r"LBFGS.*'16-mixed'"):
        make_train_step(StepSpec(module, [made], lab.loss_of), ScaledAutocastPrecision("cpu"))
    both = [made, torch.optim.SGD(module[2].parameters(), lr=0.1)]
    with pytest.raises(UnsupportedError, match=r"LBFGS.*2 optimizers"):
        make_train_step(StepSpec(module, both, lab.loss_of), FullPrecision())
    with pytest.raises(UnsupportedError, match=r"LBFGS.*manual"):
        EagerManualStep(ManualSpec(module, [made], lambda *_: None), FullPrecision())


def test_a_closure_that_is_never_called_is_reported(lab):
    """S19"""

    class Lazybones(torch.optim.SGD):
        def step(self, closure):
            return None

    _, _, step = build(lab, Lazybones)
    with pytest.raises(UserCodeError, match="did not call its closure"):
        step(lab.make_data(0, 1))


def test_a_closure_sees_the_loss_of_all_ranks(lab):
    """S19: so that all of them take the same decisions."""
    ranks = Doubled()
    _, _, step = build(lab, lbfgs, step={"collectives": ranks, "world_size": 2})
    result = step(lab.make_data(0, 1))
    assert {op for _, op in ranks.reduced} == {ReduceOp.MEAN}
    assert torch.equal(ranks.reduced[0][0], result.loss)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_makes_no_gradients_and_keeps_the_mode(lab, inference_mode):
    """S24"""
    module = lab.make_model()
    module.train()
    spec = EvalSpec(module, lambda m, x, scale=1: m(x) * scale, inference_mode)
    x = lab.make_data(0, 1)[0][0]
    with EagerEvalStep(spec, FullPrecision()) as step:
        out = step(x, 2)
    assert not out.requires_grad
    assert out.is_inference() is inference_mode
    assert torch.equal(out, module(x).detach() * 2)
    assert module.training
    assert torch.is_grad_enabled()


def test_evaluation_runs_in_the_precision(lab):
    """S24"""
    module = lab.make_model(dtype=torch.float32)
    step = EagerEvalStep(EvalSpec(module, lambda m, x: m(x)), make_precision("bf16-mixed", "cpu"))
    assert step(torch.ones(1, 3)).dtype is torch.bfloat16


def test_manual_steps_equal_a_hand_written_gan_like_loop(lab):
    """S25, S26"""
    module, reference = lab.make_model(), lab.make_model()
    mine = [torch.optim.Adam(module[i].parameters(), lr=0.1) for i in (0, 2)]
    theirs = [torch.optim.Adam(reference[i].parameters(), lr=0.1) for i in (0, 2)]

    def body(module, microbatch, sign):
        for optimizer in mine:
            step.backward(lab.loss_of(module, microbatch) * sign)
            result = step.update(optimizer, Clip(0.1))
            assert result.applied
            assert result.loss.isnan()
            module.zero_grad()
        return result.grad_norm

    step = EagerManualStep(ManualSpec(module, mine, body), FullPrecision())
    with step:
        for microbatch in lab.make_data(0, 2):
            norm = step(microbatch, -1)
            for optimizer in theirs:
                (lab.loss_of(reference, microbatch) * -1).backward()
                parameters = optimizer.param_groups[0]["params"]
                expected = nn.utils.clip_grad_norm_(parameters, 0.1)
                optimizer.step()
                reference.zero_grad()
            torch.testing.assert_close(norm, expected)
    close(module, reference)


def test_a_manual_update_keeps_the_gradients_for_the_user_to_clear(lab):
    """S26"""
    module = lab.make_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = EagerManualStep(ManualSpec(module, [optimizer], lambda *_: None), FullPrecision())
    step.backward(lab.loss_of(module, lab.make_data(0, 1)[0]))
    assert step.update(optimizer).grad_norm is None
    assert all(p.grad is not None for p in module.parameters())


def test_a_manual_update_that_overflows_is_not_applied(lab):
    """S26"""
    module = lab.make_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    precision = ScaledAutocastPrecision("cpu")
    step = EagerManualStep(ManualSpec(module, [optimizer], lambda *_: None), precision)
    before = copy.deepcopy(module)
    step.backward(module(torch.full((1, 3), torch.inf)).sum())
    assert step.update(optimizer, Clip(1.0)).applied is False
    assert same(module, before)


def test_an_optimizer_that_the_manual_step_does_not_know_is_refused(lab):
    """S27"""
    module = lab.make_model()
    known, other = (torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2))
    step = EagerManualStep(ManualSpec(module, [known], lambda *_: None), FullPrecision())
    with pytest.raises(UserCodeError, match="none of the 1 optimizers"):
        step.update(other)
