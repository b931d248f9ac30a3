"""The most memory that a rank of each strategy holds in a step, by the simulated devices' count."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivetrain_conformance import simulated
from drivetrain_conformance.support.crew import Crew

SIMULATED = Path(__file__).parents[1] / "packages/conformance/tests"
DEPTH = 8
MADE = {"width": 256, "depth": DEPTH}
UNIT = 1 / DEPTH  # of all parameters, which are those of the blocks but for a few
ADAM = 2.0  # two tensors for each parameter
UPDATE = 1.0  # what torch computes for all parameters at once in an update


def expected(kind, ranks):
    """The peak, in copies of all parameters: in the update, or where backward is at its widest."""
    share = 1 / ranks
    if kind == "DDPStrategy":
        return 1 + 1 + 1 + ADAM + UPDATE  # parameters, gradients, buckets
    if kind == "Zero1Strategy":
        return 1 + 1 + 1 + (ADAM + UPDATE) * share
    update = (1 + 1 + ADAM + UPDATE) * share
    if kind == "Zero2Strategy":  # all gathered, and whole gradients of the units at work
        return max(update, (1 + ADAM) * share + 1 + 2 * UNIT)
    return max(update, (1 + 1 + ADAM) * share + 3 * UNIT)  # units gathered, one ahead, gradients


@pytest.fixture(scope="module")
def devices():
    if reason := simulated.unavailable():
        pytest.skip(reason)
    made = {}

    def of(size):
        if size not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DRIVETRAIN_SIMULATED", '{"devices": 4}')
                patch.syspath_prepend(str(SIMULATED))
                made[size] = Crew("simulated_backend:spec", None, tuple(range(size)))
        return made[size]

    yield of
    for crew in made.values():
        crew.stop()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["DDPStrategy", "Zero1Strategy", "Zero2Strategy", "FSDPStrategy"])
def test_the_peak_of_a_step_is_what_the_division_leaves(devices, size, kind):
    for answer in devices(size).run(
        "strategy_worlds:peak", "memory", kind=kind, options={}, made=MADE
    ):
        assert answer["peak"] == pytest.approx(expected(kind, size), abs=UNIT), answer
