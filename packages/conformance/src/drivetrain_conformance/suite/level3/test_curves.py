"""Loss curves of three reference models, against recordings in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import Feature

from drivetrain_conformance.reference_models import MODELS
from drivetrain_conformance.reference_record import recordings
from drivetrain_conformance.support.curve_cases import curve, repeatable
from drivetrain_conformance.support.tolerances import curve_tolerance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain_interfaces import Backend

    from drivetrain_conformance.fixtures import Bind, Crews
    from drivetrain_conformance.target import Target

CASES = "drivetrain_conformance.support.curve_cases"


def check(found: dict[str, Any], wanted: dict[str, Any], tolerated: float, rule: str) -> None:
    """Each loss of a curve, and the evaluation after it."""
    scale = abs(wanted["losses"][0])
    pairs = [*zip(found["losses"], wanted["losses"], strict=True)]
    pairs.append((found["evaluation"], wanted["evaluation"]))
    for number, (mine, recorded) in enumerate(pairs):
        where = f"update {number}" if number < len(wanted["losses"]) else "the evaluation after it"
        assert abs(mine - recorded) <= tolerated * scale, (
            f"{rule}; the loss of {where} is {mine:.9g} and was recorded as {recorded:.9g}, and "
            f"{tolerated * scale:.2g} is tolerated"
        )


@pytest.mark.parametrize("model", MODELS)
def test_a_loss_curve_is_the_recorded_one(
    bind: Bind, backend: Backend, model: str, declared_precision: str
) -> None:
    """In every precision, within the tolerance of its format.

    R: S9, S24, P7
    """
    precision = backend.precision(declared_precision)
    found = curve(bind(precision), precision, model)
    rule = f"S9: the loss curve of {model} in {declared_precision} is the recorded one"
    check(found, recordings()[model], curve_tolerance(precision.policy), rule)


@pytest.mark.needs(Feature.SEVERAL_PROCESSES)
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_two_ranks_share_the_recorded_curve(
    crews: Crews, backend: Backend, target: Target, strategy_name: str, model: str
) -> None:
    """Each trains on one half of every batch, whose batch statistics would be others.

    R: S9, S15
    """
    from drivetrain_conformance.fixtures import usual_precision

    rule = f"S9: two ranks that share {model} have the recorded loss curve"
    answers = crews.of(2).run(f"{CASES}:share_of_curve", rule, name=strategy_name, model=model)
    losses = [sum(pair) / 2 for pair in zip(*(a["losses"] for a in answers), strict=True)]
    policy = backend.precision(usual_precision(target)).policy
    wanted = recordings()[model]
    for answer in answers:
        found = {"losses": losses, "evaluation": answer["evaluation"]}
        check(found, wanted, curve_tolerance(policy), rule)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What a trainer sets when a user asks for a run that can be repeated."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # noqa: FBT003 - torch's signature
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.needs(Feature.DETERMINISTIC)
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("model", MODELS)
def test_two_runs_are_equal_bit_for_bit(
    bind: Bind, backend: Backend, model: str, declared_precision: str
) -> None:
    """With dropout, from the same seed, in every precision.

    R: B4
    """
    precisions = [backend.precision(declared_precision) for _ in range(2)]
    one, other = (repeatable(bind(p), p, model) for p in precisions)
    differing = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not differing, (
        f"B4: a backend that declares it repeats a run bit for bit; of {model} in "
        f"{declared_precision} these differ: {differing}"
    )
