"""Clipping: one norm over everything, or every element, and the norm comes back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import Clip, ConfigurationError, Feature, UnsupportedError

from drivetrain_conformance.reference import train_by_hand
from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import mean_square, microbatches, perceptron

if TYPE_CHECKING:
    from drivetrain_conformance.fixtures import Build

LR = 0.5
WINDOWS = [[batch] for batch in microbatches(3)]
TIGHT, LOOSE = 0.125, 100.0

#: Torch divides by the norm plus 1e-6, and a backend may.
CLIPPED = 2e-5


def by_hand(clip: Clip | None) -> Any:
    """The same training in float64."""
    return train_by_hand(perceptron(), WINDOWS, mean_square, lr=LR, clip=clip)


@pytest.mark.needs(Feature.CLIP_NORM)
@pytest.mark.parametrize("limit", [TIGHT, LOOSE])
def test_clipping_by_norm_limits_one_total_norm(build: Build, limit: float) -> None:
    """A limit that is larger than the norm changes nothing.

    R: S20
    """
    wanted = by_hand(Clip(limit))
    assert all((norm > limit) == (limit == TIGHT) for norm in wanted.norms), "the test's own data"
    setup = build(clip=Clip(limit))
    results = setup.train(WINDOWS)
    setup.check(
        results, wanted, f"S20: clipping by norm limits one total norm to {limit}", at_least=CLIPPED
    )


@pytest.mark.needs(Feature.CLIP_NORM)
def test_the_norm_before_clipping_comes_back(build: Build, declared_precision: str) -> None:
    """Of unscaled gradients, in every precision.

    R: S20, P11
    """
    wanted = by_hand(Clip(TIGHT))
    setup = build(declared_precision, clip=Clip(TIGHT))
    results = setup.train(WINDOWS)
    tolerated = max(setup.tolerance.update, CLIPPED)
    for result, norm in zip(results, wanted.norms, strict=True):
        assert isinstance(result.grad_norm, torch.Tensor), (
            f"S20: grad_norm is a tensor when clipping by norm; it is {result.grad_norm!r}"
        )
        assert float(result.grad_norm) == pytest.approx(norm, rel=tolerated), (
            "S20: grad_norm is the norm of the unscaled gradients before clipping"
        )


@pytest.mark.needs(Feature.CLIP_NORM, Feature.SEVERAL_OPTIMIZERS)
def test_the_norm_is_one_over_all_optimizers(build: Build) -> None:
    """And a gradient that two optimizers update counts once.

    R: S20
    """

    def optimizers(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
        parameters = list(module.parameters())
        return [
            torch.optim.SGD(parameters[:2], LR),
            torch.optim.SGD(parameters[2:], LR),
            torch.optim.SGD(parameters[1:3], 0.0),
        ]

    wanted = by_hand(Clip(TIGHT))
    setup = build(clip=Clip(TIGHT), optimizers=optimizers)
    results = setup.train(WINDOWS)
    setup.check(
        results,
        wanted,
        "S20: there is one total norm, in which each gradient counts once",
        at_least=CLIPPED,
    )
    norm = results[0].grad_norm
    assert norm is not None, "S20: grad_norm is a tensor when clipping by norm"
    assert float(norm) == pytest.approx(wanted.norms[0], rel=setup.tolerance.update), (
        "S20: grad_norm is one norm over all optimizers, in which every gradient counts once"
    )


@pytest.mark.needs(Feature.CLIP_VALUE)
def test_clipping_by_value_limits_every_element(build: Build) -> None:
    """And no norm comes back.

    R: S21
    """
    clip = Clip(0.125, "value")
    wanted = by_hand(clip)
    setup = build(clip=clip)
    results = setup.train(WINDOWS)
    setup.check(results, wanted, "S21: clipping by value limits every element", at_least=CLIPPED)
    assert results[0].grad_norm is None, "S21: there is no norm when clipping by value"


@pytest.mark.needs(Feature.CLIP_NORM, Feature.ACCUMULATION)
def test_clipping_comes_after_accumulation(build: Build) -> None:
    """Not once per microbatch.

    R: S9, S20
    """
    windows = [microbatches(3)]
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, clip=Clip(TIGHT))
    setup = build(accumulate=3, clip=Clip(TIGHT))
    results = setup.train(windows)
    setup.check(
        results, wanted, "S9: what is clipped is the gradient of the whole window", at_least=CLIPPED
    )


def test_an_unknown_way_to_clip_is_refused(build: Build) -> None:
    """When the step is built, not when it runs.

    R: S22
    """
    rule = "S22: what a step cannot do is refused when it is built, with an UnsupportedError"
    with refused(UnsupportedError, naming="median", rule=rule):
        build(clip=Clip(1.0, "median"))


@pytest.mark.needs(Feature.CLIP_NORM)
@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_meaningless_limit_is_refused(build: Build, limit: float) -> None:
    """Zero would stop training, and infinity would do nothing.

    R: S22
    """
    rule = f"S22: clipping at {limit} is refused when the step is built"
    with refused((ConfigurationError, UnsupportedError), naming=re.escape(repr(limit)), rule=rule):
        build(clip=Clip(limit))
