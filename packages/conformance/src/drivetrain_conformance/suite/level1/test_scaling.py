"""A scaled loss: an update that is not finite moves nothing, and the scale finds itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import (
    CheckpointError,
    Clip,
    Feature,
    StepHook,
    StepHooks,
    UnsupportedError,
    UserCodeError,
)

from drivetrain_conformance.reference import train_by_hand
from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import mean_square, microbatches, perceptron

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

    from drivetrain_conformance.fixtures import Build
    from drivetrain_conformance.support.setups import Setup

#: The loss stays finite in float32, and its gradients do not in float16.
TOO_LARGE = 1e30
LR = 0.5


def steep(module: torch.nn.Module, item: Any) -> torch.Tensor:
    """A loss that a batch may multiply: its third element says by how much."""
    loss: torch.Tensor = mean_square(module, item[:2]) * item[2]
    return loss


def batch(factor: float, seed: int = 0) -> Any:
    """A microbatch for ``steep``."""
    return (*microbatches(1, seed=seed)[0], torch.tensor(factor))


def momentum(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """An optimizer with state, so that it can be seen not to move."""
    return [torch.optim.SGD(module.parameters(), lr=LR, momentum=0.5)]


def two_of_them(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Two optimizers, of which only the first has a gradient that is not finite."""
    parameters = list(module.parameters())
    return [
        torch.optim.SGD(parameters[:2], lr=LR, momentum=0.5),
        torch.optim.SGD(parameters[2:], lr=LR, momentum=0.5),
    ]


def state_of(setup: Setup) -> list[Any]:
    """The optimizers' state as nested lists."""
    return [
        [
            [value.tolist() if isinstance(value, torch.Tensor) else value for value in s.values()]
            for s in optimizer.state.values()
        ]
        for optimizer in setup.optimizers
    ]


def check_found_inf(setup: Setup) -> None:
    """One good update, one that is not finite, and a good one again."""
    setup.train([[batch(1.0)]])
    before, state = setup.parameters(), state_of(setup)
    with setup.step:
        result = setup.step([setup.strategy.feed(batch(TOO_LARGE))])
    assert result.applied is False, (
        "P10: an update with a gradient that is not finite returns applied=False"
    )
    moved = [name for name, value in setup.parameters().items() if not value.equal(before[name])]
    assert not moved, f"P10: an update that is not finite moves no parameter; it moved {moved}"
    assert state_of(setup) == state, "P10: an update that is not finite moves no optimizer state"
    assert all(p.grad is None for p in setup.module.parameters()), (
        "S11: gradients are cleared also when the update was not applied"
    )
    (again,) = setup.train([[batch(1.0, seed=1)]])
    assert again.applied, "P10: the next finite update is applied"
    assert any(not value.equal(before[name]) for name, value in setup.parameters().items()), (
        "P10: the next finite update moves parameters"
    )


def test_an_update_that_is_not_finite_moves_nothing(build: Build, scaled_precision: str) -> None:
    """Neither parameters nor optimizer state.

    R: P10, S11, S15
    """
    check_found_inf(build(scaled_precision, loss=steep, optimizers=momentum))


@pytest.mark.needs(Feature.SEVERAL_OPTIMIZERS)
def test_all_optimizers_update_or_none(build: Build, scaled_precision: str) -> None:
    """A gradient that is not finite in one stops all.

    R: P10, S23
    """

    def only_first(module: torch.nn.Module, item: Any) -> torch.Tensor:
        first = next(iter(module.parameters()))
        loss: torch.Tensor = mean_square(module, item[:2]) + (first * (item[2] - 1.0)).sum() * 1e8
        return loss

    setup = build(scaled_precision, loss=only_first, optimizers=two_of_them)
    check_found_inf(setup)


@pytest.mark.needs(Feature.ACCUMULATION)
def test_one_microbatch_that_is_not_finite_stops_the_window(
    build: Build, scaled_precision: str
) -> None:
    """Also if it is not the last.

    R: P10, P12
    """
    setup = build(scaled_precision, loss=steep, optimizers=momentum, accumulate=2)
    setup.train([[batch(1.0), batch(1.0, seed=2)]])
    before = setup.parameters()
    with setup.step:
        result = setup.step([setup.strategy.feed(item) for item in (batch(TOO_LARGE), batch(1.0))])
    assert result.applied is False, "P10: one microbatch that is not finite stops the window"
    assert all(value.equal(before[name]) for name, value in setup.parameters().items()), (
        "P10: a window that is not finite moves nothing"
    )


@pytest.mark.needs(StepHook.BEFORE_OPTIMIZER_STEP)
def test_hooks_are_called_before_it_is_known_whether_gradients_are_finite(
    build: Build, scaled_precision: str
) -> None:
    """Finding out is what waits for the device.

    R: P11
    """
    calls: list[int] = []
    hooks = StepHooks(before_optimizer_step=lambda _: calls.append(1))
    setup = build(scaled_precision, loss=steep, hooks=hooks)
    with setup.step:
        result = setup.step([setup.strategy.feed(batch(TOO_LARGE))])
    assert result.applied is False, "P10: an update that is not finite is not applied"
    assert calls == [1], (
        f"P11: before_optimizer_step is called once, before it is known whether gradients are "
        f"finite; it was called {len(calls)} times"
    )


@pytest.mark.needs(Feature.CLIP_NORM)
def test_clipping_hides_nothing_that_is_not_finite(build: Build, scaled_precision: str) -> None:
    """Infinity times zero is no gradient.

    R: P10, S20
    """
    setup = build(scaled_precision, loss=steep, optimizers=momentum, clip=Clip(0.125))
    check_found_inf(setup)


def test_the_scale_shrinks_until_updates_fit(build: Build, scaled_precision: str) -> None:
    """A loss that is too large for the first scale trains nevertheless.

    R: P10
    """
    windows = [[batch(64.0)]]
    setup = build(
        scaled_precision,
        loss=steep,
        optimizers=lambda module: [torch.optim.SGD(module.parameters(), lr=LR / 64)],
    )
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, steep, lr=LR / 64)
    setup.check(results, wanted, "P10: after updates that were not finite the scale fits")


def test_the_loss_of_an_update_that_was_not_applied_is_told(
    build: Build, scaled_precision: str
) -> None:
    """Undivided and unscaled, as always.

    R: S15
    """
    setup = build(scaled_precision, loss=steep)
    with setup.step:
        result = setup.step([setup.strategy.feed(batch(TOO_LARGE))])
    wanted = train_by_hand(perceptron(), [[batch(TOO_LARGE)]], steep, lr=0.0).losses[0]
    assert float(result.loss) == pytest.approx(wanted, rel=setup.tolerance.loss), (
        "S15: the loss of a result is unscaled, also if the update was not applied"
    )


def test_the_scale_is_part_of_the_state(build: Build, scaled_precision: str) -> None:
    """In JSON values and tensors, and it shrinks when gradients are not finite.

    R: P13, P10
    """
    setup = build(scaled_precision, loss=steep)
    setup.train([[batch(1.0)]])
    before = setup.precision.state_dict()
    assert before, "P13: a precision with a loss scale has a state"
    for key, value in before.items():
        if not isinstance(value, torch.Tensor):
            json.dumps({key: value})
    with setup.step:
        setup.step([setup.strategy.feed(batch(TOO_LARGE))])
    after = setup.precision.state_dict()
    shrunk = [k for k in before if is_number(before[k]) and float(after[k]) < float(before[k])]
    assert shrunk, f"P10: the scale shrinks; the state was {before} and is {after}"


def is_number(value: Any) -> bool:
    """Whether this is one number."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def test_the_scale_comes_back(build: Build, backend: Backend, scaled_precision: str) -> None:
    """And an empty state, from a run without a scale, changes nothing.

    R: P13
    """
    setup = build(scaled_precision, loss=steep)
    with setup.step:
        setup.step([setup.strategy.feed(batch(TOO_LARGE))])
    saved = setup.precision.state_dict()
    other = backend.precision(scaled_precision)
    fresh = other.state_dict()
    other.load_state_dict({})
    assert comparable(other.state_dict()) == comparable(fresh), (
        "P13: an empty state changes nothing"
    )
    other.load_state_dict(saved)
    assert comparable(other.state_dict()) == comparable(saved), (
        "P13: load_state_dict restores what state_dict returned"
    )


def test_the_scale_is_part_of_what_a_run_goes_on_from(build: Build, scaled_precision: str) -> None:
    """Without it, the first updates after a resume would be lost to finding it again.

    R: S28, P13
    """
    setup = build(scaled_precision, loss=steep)
    with setup.step:
        setup.step([setup.strategy.feed(batch(TOO_LARGE))])
    state = setup.strategy.state()
    other = build(scaled_precision, loss=steep)
    other.strategy.load(state)
    found = comparable(dict(other.strategy.state().precision))
    assert found == comparable(dict(state.precision)), (
        f"S28: what load takes holds the state of the precision, {dict(state.precision)}; after "
        f"load it is {found}"
    )


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """A state whose values can be compared."""
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def test_the_state_of_something_else_is_refused(
    device_backend: Backend, scaled_precision: str
) -> None:
    """It would be a scale of nobody knows what.

    R: P13
    """
    rule = "P13: a state of something else is a CheckpointError"
    with refused(CheckpointError, naming="state|checkpoint", rule=rule):
        device_backend.precision(scaled_precision).load_state_dict({"no-such-key": 1.0})


def test_an_update_before_any_backward_is_refused(
    device_backend: Backend, scaled_precision: str
) -> None:
    """Gradients that were not scaled would be divided by the scale.

    R: P14
    """
    module = perceptron()
    mean_square(module, microbatches(1)[0]).backward()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    rule = "P14: an update before any backward through the precision is a UserCodeError"
    with refused(UserCodeError, naming="backward", rule=rule):
        device_backend.precision(scaled_precision).step([optimizer], lambda: None)


def test_parameters_in_half_precision_are_refused(
    device_backend: Backend, scaled_precision: str
) -> None:
    """There would be nothing that a scale could save.

    R: P15
    """
    rule = f"P15: parameters in float16 are refused in {scaled_precision!r}"
    with refused(UnsupportedError, naming="float16", rule=rule):
        device_backend.precision(scaled_precision).convert(perceptron().half())
