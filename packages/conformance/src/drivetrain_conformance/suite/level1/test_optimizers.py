"""Several optimizers on one loss, and those that evaluate the loss themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import Clip, Feature, UnsupportedError

from drivetrain_conformance.reference import Trained, as_double, train_by_hand
from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import (
    joined,
    mean_square,
    microbatches,
    parameters_of,
    perceptron,
    sgd,
)

if TYPE_CHECKING:
    from drivetrain_conformance.fixtures import Build

LR = 0.5


@pytest.mark.needs(Feature.SEVERAL_OPTIMIZERS)
def test_all_optimizers_of_a_step_update(build: Build) -> None:
    """Each with its own hyperparameters.

    R: S23
    """

    def optimizers(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
        parameters = list(module.parameters())
        return [torch.optim.SGD(parameters[:1], LR), torch.optim.SGD(parameters[1:], LR)]

    windows = [[batch] for batch in microbatches(3)]
    setup = build(optimizers=optimizers)
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S23: all optimizers of a step update")


def lbfgs(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Three evaluations a step, without a line search."""
    return [torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=3, max_eval=4)]


def lbfgs_by_hand(windows: list[Any], limit: float | None = None) -> Trained:
    """L-BFGS on float64 and whole windows."""
    twin = perceptron().double()
    told = Trained(parameters_of(twin))
    (optimizer,) = lbfgs(twin)
    for window in windows:
        batch = as_double(joined(window))

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = mean_square(twin, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
            return loss.detach()

        told.losses.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
    told.end = parameters_of(twin)
    return told


@pytest.mark.needs(Feature.CLOSURE)
def test_an_optimizer_with_a_closure_works(build: Build) -> None:
    """Each of its evaluations is one forward and backward; the result tells of the first.

    R: S19
    """
    windows = [[batch] for batch in microbatches(2)]
    setup = build(optimizers=lbfgs)
    results = setup.train(windows)
    setup.check(results, lbfgs_by_hand(windows), "S19: an optimizer with a closure works")


@pytest.mark.needs(Feature.CLOSURE, Feature.ACCUMULATION)
def test_an_optimizer_with_a_closure_repeats_the_whole_window(build: Build) -> None:
    """It accumulates in every evaluation.

    R: S19
    """
    windows = [microbatches(2), microbatches(2, seed=3)]
    setup = build(optimizers=lbfgs, accumulate=2)
    results = setup.train(windows)
    setup.check(results, lbfgs_by_hand(windows), "S19: each evaluation repeats the whole window")


@pytest.mark.needs(Feature.CLOSURE, Feature.CLIP_NORM)
def test_an_optimizer_with_a_closure_sees_clipped_gradients(build: Build) -> None:
    """In every evaluation; the norm is that of the first.

    R: S19, S20
    """
    windows = [[batch] for batch in microbatches(2)]
    setup = build(optimizers=lbfgs, clip=Clip(0.125))
    results = setup.train(windows)
    rule = "S19: each evaluation clips"
    # What it learns of the curvature comes from differences of small gradients: rounding shows.
    setup.check(results, lbfgs_by_hand(windows, 0.125), rule, at_least=5e-4)
    wanted = train_by_hand(perceptron(), windows[:1], mean_square, lr=LR).norms[0]
    norm = results[0].grad_norm
    assert norm is not None, "S20: grad_norm is a tensor when clipping by norm"
    assert float(norm) == pytest.approx(wanted, rel=setup.tolerance.update), (
        "S19: the result tells of the first evaluation, also its norm before clipping"
    )


@pytest.mark.needs(Feature.CLOSURE, Feature.SEVERAL_OPTIMIZERS)
def test_an_optimizer_with_a_closure_works_alone(build: Build) -> None:
    """A second one would move what the first one's line search relies on.

    R: S19, S22
    """
    rule = "S19: an optimizer with a closure beside another one is refused when the step is built"
    with refused(UnsupportedError, naming="LBFGS", rule=rule):
        build(optimizers=lambda module: [*lbfgs(module), sgd(module)])


@pytest.mark.needs(Feature.CLOSURE)
def test_an_optimizer_with_a_closure_takes_no_scaled_loss(
    build: Build, scaled_precision: str
) -> None:
    """It compares losses and gradients of several evaluations.

    R: S19, S22
    """
    rule = "S19: an optimizer with a closure and a loss scale are refused when the step is built"
    with refused(UnsupportedError, naming="LBFGS", rule=rule):
        build(scaled_precision, optimizers=lbfgs)


def test_parameters_that_the_loss_does_not_reach_stay(build: Build) -> None:
    """They have no gradient, and optimizers pass over them.

    R: S9
    """

    class WithSpare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = perceptron()
            self.spare = torch.nn.Parameter(torch.ones(2))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.used(features)
            return result

    setup = build(module=WithSpare())
    setup.train([microbatches(1)])
    now = setup.parameters()
    assert torch.equal(now["spare"], setup.start["spare"]), (
        "S9: a parameter that the loss does not reach stays as it was"
    )
    assert not torch.equal(now["used.0.weight"], setup.start["used.0.weight"]), (
        "S9: parameters that the loss reaches are updated"
    )
