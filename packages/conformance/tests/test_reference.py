"""The references: exact data, gradients against finite differences, and recordings that hold."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from drivetrain_interfaces import Clip, PrecisionPolicy  # noqa: E402

from drivetrain_conformance import reference_record  # noqa: E402 - they import torch
from drivetrain_conformance.reference import (  # noqa: E402
    clipped,
    distance,
    norm,
    train_by_hand,
    way,
)
from drivetrain_conformance.reference_models import MODELS, STEPS  # noqa: E402
from drivetrain_conformance.support import problems  # noqa: E402
from drivetrain_conformance.support.tolerances import curve_tolerance, tolerance  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_format_holds_the_data_exactly(dtype):
    drawn = [t for pair in problems.microbatches(3) for t in pair]
    drawn += problems.parameters_of(problems.perceptron()).values()
    for tensor in drawn:
        assert torch.equal(tensor.to(dtype).float(), tensor)


def test_the_data_are_what_they_were():
    """Python's generator draws the same everywhere; recorded curves rely on it."""
    assert problems.exact((4,), 7).mul(64).tolist() == [-23.0, -45.0, 19.0, -55.0]


def test_different_seeds_give_different_data():
    one, other = (problems.microbatches(1, seed=seed)[0][0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_training_by_hand_agrees_with_finite_differences():
    module = problems.perceptron()
    (batch,) = problems.microbatches(1)
    told = train_by_hand(module, [[batch]], problems.mean_square, lr=1.0)
    double = [t.double() for t in batch]
    for name, gradient in told.gradients[0].items():
        for place in range(gradient.numel()):
            twin = problems.perceptron().double()
            values = []
            for sign in (1, -1):
                parameter = dict(twin.named_parameters())[name]
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * 1e-6
                    values.append(float(problems.mean_square(twin, double)))
                    parameter.view(-1)[place] -= sign * 1e-6
            slope = (values[0] - values[1]) / 2e-6
            assert slope == pytest.approx(float(gradient.view(-1)[place]), abs=1e-8)


def test_training_by_hand_agrees_with_torchs_own_optimizer_and_clipping():
    windows = [problems.microbatches(2, rows=(1, 5), seed=seed) for seed in range(3)]
    told = train_by_hand(
        problems.perceptron(),
        windows,
        problems.mean_square,
        lr=0.5,
        clip=Clip(0.125),
        weight=problems.samples,
    )
    twin = problems.perceptron().double()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    for window, wanted in zip(windows, told.norms, strict=True):
        loss = problems.mean_square(twin, [t.double() for t in problems.joined(window)])
        loss.backward()
        found = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.125)
        assert float(found) == pytest.approx(wanted, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in problems.parameters_of(twin).items():
        assert torch.allclose(told.end[name], value, atol=1e-5)


def test_training_by_hand_leaves_the_module():
    module = problems.perceptron()
    before = problems.parameters_of(module)
    train_by_hand(module, [problems.microbatches(1)], problems.mean_square, lr=0.5)
    assert all(torch.equal(before[n], p) for n, p in problems.parameters_of(module).items())


def test_clipping_by_hand():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([-4.0])}
    assert norm(grads) == 5
    assert norm(clipped(grads, Clip(1.0))) == pytest.approx(1.0)
    assert clipped(grads, Clip(100.0))["a"].item() == 3
    assert clipped(grads, Clip(3.5, "value"))["b"].item() == -3.5
    assert norm(clipped({"a": torch.zeros(2)}, Clip(1.0))) == 0


def test_distances_are_relative_to_what_is_wanted():
    start, end = {"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 2.0])}
    assert distance(way(start, end), way(start, end)) == 0
    assert distance(way(start, start), way(start, end)) == 1
    assert distance(way(start, {"a": torch.tensor([0.0, 4.0])}), way(start, end)) == 1


def test_the_widest_tolerance_counts():
    mixed = tolerance(PrecisionPolicy(compute="bfloat16"))
    true = tolerance(PrecisionPolicy("bfloat16", "bfloat16", "bfloat16"))
    assert tolerance(PrecisionPolicy()).update < mixed.update < true.update
    assert tolerance(PrecisionPolicy("float64", "float64", "float64")).update < 1e-9
    assert tolerance(PrecisionPolicy(compute="float64")).update >= 1e-5  # stored in float32
    assert tolerance(PrecisionPolicy(compute="float8_e4m3fn")).update > mixed.update
    assert curve_tolerance(PrecisionPolicy(compute="bfloat16")) > curve_tolerance(PrecisionPolicy())


def test_no_tolerance_hides_a_factor():
    """The least that a wrong factor does here is one quarter."""
    for compute in ("float64", "float32", "float16", "bfloat16"):
        for stored in ("float32", compute):
            assert tolerance(PrecisionPolicy(stored, compute)).update < 0.25


@pytest.mark.parametrize("name", MODELS)
def test_a_recording_still_holds(name):
    found = {name: reference_record.record(MODELS[name])}
    wanted = {name: reference_record.recordings()[name]}
    assert reference_record.differing(found, wanted) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_reference_model_learns(name):
    losses = reference_record.recordings()[name]["losses"]
    assert len(losses) == STEPS
    assert math.fsum(losses[-4:]) < 0.9 * math.fsum(losses[:4])


def test_a_recording_that_does_not_hold_is_named():
    recorded = reference_record.recordings()
    wrong = {
        name: {**curve, "losses": [*curve["losses"][:-1], 0.0]} if name == "mlp" else curve
        for name, curve in recorded.items()
    }
    assert reference_record.differing(wrong, recorded) == ["mlp"]
    assert reference_record.differing({}, recorded) == sorted(recorded)
