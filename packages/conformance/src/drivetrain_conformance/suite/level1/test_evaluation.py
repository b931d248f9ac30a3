"""Evaluation: without gradients, in the precision's format, on the module itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import EvalSpec, EvalStep, Feature

from drivetrain_conformance.reference import as_double
from drivetrain_conformance.support.problems import mean_square, microbatches, perceptron

if TYPE_CHECKING:
    from drivetrain_conformance.fixtures import Bind, Build


def test_evaluation_computes_as_by_hand(build: Build, declared_precision: str) -> None:
    """In every precision, within its tolerance.

    R: S24
    """
    setup = build(declared_precision)
    item = microbatches(1)[0]
    spec = EvalSpec(setup.module, mean_square, inference_mode=False)
    with setup.strategy.eval_step(spec) as step:
        found = float(step(setup.strategy.feed(item)))
    with torch.no_grad():
        wanted = float(mean_square(perceptron().double(), as_double(item)))
    assert found == pytest.approx(wanted, rel=setup.tolerance.loss), (
        f"S24: an evaluation step runs in the precision's context; {found} should be {wanted}"
    )


def test_evaluation_runs_without_gradients(bind: Bind) -> None:
    """On the very module that was given, whatever its mode.

    R: S24
    """
    strategy = bind()
    module = strategy.prepare(perceptron())
    seen: list[Any] = []

    def function(given: torch.nn.Module, *args: Any) -> Any:
        seen.append((given is module, torch.is_grad_enabled(), given.training, args))
        return {"of": "the user"}

    step = strategy.eval_step(EvalSpec(module, function, inference_mode=False))
    assert isinstance(step, EvalStep), "S24: an evaluation step has all members of EvalStep"
    for training in (True, False):
        module.train(training)
        with step:
            returned = step(1, "two")
        assert returned == {"of": "the user"}, "S24: it returns what the user's function returned"
        same, grad, mode, args = seen[-1]
        assert same, "S24: the function gets the module itself, never a wrapper"
        assert not grad, "S24: an evaluation step runs without gradients"
        assert mode is training, "S24: the module's mode is the caller's business"
        assert args == (1, "two"), "S24: the function gets the arguments of the step"
    assert torch.is_grad_enabled(), "S24: gradients are enabled again afterwards"


@pytest.mark.parametrize(
    "inference", [False, pytest.param(True, marks=pytest.mark.needs(Feature.INFERENCE_MODE))]
)
def test_an_error_in_evaluation_leaves_no_trace(bind: Bind, *, inference: bool) -> None:
    """Training may go on after it.

    R: S24, P6
    """
    strategy = bind()
    module = strategy.prepare(perceptron())

    def function(_: torch.nn.Module) -> None:
        raise OSError("the user's own")

    step = strategy.eval_step(EvalSpec(module, function, inference_mode=inference))
    with pytest.raises(OSError, match="the user's own"), step:
        step()
    assert torch.is_grad_enabled(), "S24: gradients are enabled again after an error"
    assert not torch.is_inference_mode_enabled(), "S24: inference mode ends with an error"


@pytest.mark.needs(Feature.INFERENCE_MODE)
@pytest.mark.parametrize("wanted", [True, False])
def test_inference_mode_is_what_was_asked_for(bind: Bind, *, wanted: bool) -> None:
    """Without it, results may enter a graph later.

    R: S24
    """
    strategy = bind()
    module = strategy.prepare(perceptron())

    def function(_: torch.nn.Module) -> bool:
        return torch.is_inference_mode_enabled()

    with strategy.eval_step(EvalSpec(module, function, inference_mode=wanted)) as step:
        found = step()
    assert found is wanted, f"S24: inference_mode={wanted} was asked for; it was {found}"


def test_evaluation_moves_nothing(build: Build) -> None:
    """Training goes on as if it had not been there.

    R: S24
    """
    windows = [[batch] for batch in microbatches(2)]
    plain, interrupted = build(), build()
    plain.train(windows)
    interrupted.train(windows[:1])
    spec = EvalSpec(interrupted.module, mean_square, inference_mode=False)
    with interrupted.strategy.eval_step(spec) as step:
        step(interrupted.strategy.feed(windows[0][0]))
    interrupted.train(windows[1:])
    for name, value in plain.parameters().items():
        assert torch.equal(interrupted.parameters()[name], value), (
            f"S24: an evaluation between two steps changes nothing; {name!r} differs"
        )
