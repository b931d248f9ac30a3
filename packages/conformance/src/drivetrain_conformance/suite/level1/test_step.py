"""One call trains on one window: losses, accumulation, weights, and what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import DataError, Feature, StepResult, TrainStep, UserCodeError

from drivetrain_conformance.reference import train_by_hand
from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import (
    joined,
    mean_square,
    microbatches,
    perceptron,
    samples,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drivetrain_conformance.fixtures import Build

LR = 0.5
WINDOW = 3


def test_every_declared_precision_trains_as_by_hand(build: Build, declared_precision: str) -> None:
    """Three updates, compared with float64 within the tolerance of the format.

    R: S9, B4
    """
    windows = [[batch] for batch in microbatches(3)]
    setup = build(declared_precision)
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S9: a step is forward, backward and update")


def test_a_result_says_what_happened(build: Build) -> None:
    """Counters and logs live on it.

    R: S15
    """
    setup = build()
    assert isinstance(setup.step, TrainStep), "S9: a train step has all members of TrainStep"
    result = setup.train([microbatches(1)])[0]
    assert isinstance(result, StepResult), f"S15: a step returns a StepResult, not {result!r}"
    assert isinstance(result.loss, torch.Tensor), "S15: the loss of a result is a tensor"
    assert result.loss.numel() == 1, f"S15: the loss is a scalar; its shape is {result.loss.shape}"
    assert not result.loss.requires_grad, "S15: the loss of a result is detached from its graph"
    assert result.applied is True, f"S15: applied is a bool; it is {result.applied!r}"
    assert result.grad_norm is None, "S15: grad_norm is None without clipping by norm"


def test_the_loss_stays_on_the_device(build: Build) -> None:
    """Reading it on the host would wait for the device at every step.

    R: S15, S16
    """
    setup = build()
    result = setup.train([microbatches(1)])[0]
    assert result.loss.device.type == setup.strategy.device.type, (
        f"S15: the loss stays on the device, {setup.strategy.device}; it is on {result.loss.device}"
    )


@pytest.mark.needs(Feature.ACCUMULATION)
def test_accumulating_equals_one_large_batch(build: Build) -> None:
    """Several microbatches update as one batch of that many times the size.

    R: S15, S17
    """
    parts = microbatches(WINDOW)
    several = build(accumulate=WINDOW)
    results = several.train([parts])
    wanted = train_by_hand(perceptron(), [[joined(parts)]], mean_square, lr=LR)
    several.check(results, wanted, f"S17: {WINDOW} microbatches update as one large batch does")


@pytest.mark.needs(Feature.ACCUMULATION)
def test_a_tail_window_is_divided_by_what_it_holds(build: Build) -> None:
    """The last window of an epoch is often shorter.

    R: S17
    """
    drawn = microbatches(2 * WINDOW + 2)
    windows = [drawn[:WINDOW], drawn[WINDOW : 2 * WINDOW], drawn[2 * WINDOW :]]
    setup = build(accumulate=WINDOW)
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S17: what is divided by is what the window really holds")


@pytest.mark.needs(Feature.ACCUMULATION)
def test_a_window_of_one_is_an_ordinary_step(build: Build) -> None:
    """It is not multiplied by anything, so that it is equal bit for bit.

    R: S17
    """
    windows = [[batch] for batch in microbatches(2)]
    plain, short = build(), build(accumulate=WINDOW)
    plain.train(windows)
    short.train(windows)
    for name, value in plain.parameters().items():
        assert torch.equal(short.parameters()[name], value), (
            f"S17: a window of one is not multiplied by anything; {name!r} differs from a step "
            "without accumulation"
        )


@pytest.mark.needs(Feature.ACCUMULATION)
def test_weighted_microbatches_equal_one_large_batch(build: Build) -> None:
    """Microbatches of 1, 5 and 2 samples count by their samples.

    R: S18
    """
    parts = microbatches(WINDOW, rows=(1, 5, 2))
    setup = build(accumulate=WINDOW, weight=samples)
    results = setup.train([parts])
    wanted = train_by_hand(perceptron(), [[joined(parts)]], mean_square, lr=LR)
    setup.check(results, wanted, "S18: a microbatch counts for its share of the window's weight")


@pytest.mark.needs(Feature.ACCUMULATION)
def test_a_window_of_one_is_not_weighted(build: Build) -> None:
    """There is nothing to weigh it against, and the weight is not even asked for.

    R: S18, S17
    """

    def weight(_: Any) -> float:
        pytest.fail("S18: the weight of a microbatch that is alone in its window is not asked for")

    windows = [microbatches(1)]
    setup = build(accumulate=WINDOW, weight=weight)
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S18: a microbatch that is alone in its window counts as it is")


@pytest.mark.needs(Feature.ACCUMULATION)
def test_a_weight_of_zero_counts_for_nothing(build: Build) -> None:
    """Also if it is the first or the last of its window.

    R: S18
    """
    drawn = microbatches(6)
    weights = [0.0, 3.0, 1.0, 2.0, 2.0, 0.0]
    by_id = {float(item[0].sum()): w for item, w in zip(drawn, weights, strict=True)}
    assert len(by_id) == len(drawn)

    def weight(item: Any) -> float:
        return by_id[float(item[0].double().sum())]

    windows = [drawn[:3], drawn[3:]]
    setup = build(accumulate=WINDOW, weight=weight)
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, weight=weight)
    setup.check(results, wanted, "S18: a microbatch of weight zero counts for nothing")


@pytest.mark.needs(Feature.ACCUMULATION)
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_meaningless_weight_is_refused(build: Build, bad: float) -> None:
    """It would turn all parameters into NaN, or walk uphill.

    R: S18
    """
    setup = build(accumulate=2, weight=lambda _: bad)
    rule = f"S18: weights are finite and not negative; {bad} is refused"
    with refused((DataError, UserCodeError), naming="weight", rule=rule):
        setup.train([microbatches(2)])


@pytest.mark.needs(Feature.ACCUMULATION)
def test_weights_that_are_all_zero_are_refused(build: Build) -> None:
    """There is nothing to divide by.

    R: S18
    """
    setup = build(accumulate=2, weight=lambda _: 0.0)
    kinds = (DataError, UserCodeError)
    with refused(kinds, naming="weight", rule="S18: weights are not all zero in a window"):
        setup.train([microbatches(2)])


class Drawn:
    """A window that notes when it is drawn from; its length may be a lie."""

    def __init__(self, items: list[Any], length: int, notes: list[str]) -> None:
        self._items = items
        self._length = length
        self._notes = notes

    def __len__(self) -> int:
        return self._length

    def __contains__(self, item: object) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self._items):
            self._notes.append(f"draw {number}")
            yield item


@pytest.mark.needs(Feature.ACCUMULATION)
def test_microbatches_are_drawn_when_they_are_needed(build: Build) -> None:
    """A window is larger than what fits on the device.

    R: S14
    """
    notes: list[str] = []

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        notes.append("forward")
        return mean_square(module, item)

    setup = build(accumulate=2, loss=loss)
    fed = [setup.strategy.feed(item) for item in microbatches(2)]
    with setup.step:
        setup.step(Drawn(fed, 2, notes))
    assert notes == ["draw 0", "forward", "draw 1", "forward"], (
        f"S14: microbatches are drawn once, in order, each when it is about to be used; the step "
        f"did {notes}"
    )


@pytest.mark.needs(Feature.ACCUMULATION)
@pytest.mark.parametrize(("holds", "says"), [(0, 0), (3, 3), (1, 2), (2, 1), (0, 1)])
def test_a_window_that_does_not_fit_is_refused(build: Build, holds: int, says: int) -> None:
    """Empty, longer than the step takes, or of another length than it says.

    R: S13, S11
    """
    setup = build(accumulate=2)
    fed = [setup.strategy.feed(item) for item in microbatches(holds)]
    rule = (
        f"S13: a window that says {says} and yields {holds} is a DataError in a step that takes "
        "1 to 2"
    )
    with setup.step, refused(DataError, naming=r"microbatch|window", rule=rule):
        setup.step(Drawn(fed, says, []))
    assert all(p.grad is None for p in setup.module.parameters()), (
        "S11: a window leaves no gradients for the next one, also when it was refused"
    )


BAD_LOSSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda _: None,
    "a number": lambda _: 1.0,
    "a vector": lambda loss: loss.expand(2),
    "no gradient": lambda loss: loss.detach(),
    "a dictionary": lambda loss: {"loss": loss},
}


@pytest.mark.parametrize("what", BAD_LOSSES)
def test_a_loss_that_cannot_be_used_is_refused(build: Build, what: str) -> None:
    """The text says what it was and what to return.

    R: S12, S11
    """
    setup = build(loss=lambda module, item: BAD_LOSSES[what](mean_square(module, item)))
    rule = f"S12: a loss that is {what} is a UserCodeError that says what to return"
    with refused(UserCodeError, naming="loss", rule=rule):
        setup.train([microbatches(1)])
    setup.check_still("S12: a loss that cannot be used moves nothing")


def test_a_loss_of_one_element_is_used(build: Build) -> None:
    """Its shape does not matter.

    R: S12
    """
    windows = [microbatches(1)]
    setup = build(loss=lambda module, item: mean_square(module, item).reshape(1, 1))
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S12: a loss is a tensor with one element")


def test_gradients_are_cleared_after_the_update(build: Build) -> None:
    """They need no memory during the next forward.

    R: S11
    """
    setup = build()
    setup.train([microbatches(1)])
    assert all(p.grad is None for p in setup.module.parameters()), (
        "S11: gradients are cleared, set to None, after the update"
    )


@pytest.mark.needs(Feature.ACCUMULATION)
def test_a_window_that_user_code_broke_leaves_nothing(build: Build) -> None:
    """Gradients of half a window must not reach the next one.

    R: S11
    """
    broken = [True]

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        if broken and item[0].shape[0] == 1:
            broken.clear()
            raise OSError("the user's own")
        return mean_square(module, item)

    setup = build(accumulate=2, loss=loss)
    with pytest.raises(OSError, match="the user's own"):
        setup.train([microbatches(2, rows=(4, 1))])
    setup.check_still("S11: a window that user code broke moves nothing")
    windows = [microbatches(2, seed=5)]
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S11: a window that user code broke leaves nothing for the next")


def test_a_step_may_be_left_and_entered_again(build: Build) -> None:
    """Validation runs in between.

    R: S9
    """
    windows = [[batch] for batch in microbatches(3)]
    setup = build()
    results = [setup.train([window])[0] for window in windows]
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    setup.check(results, wanted, "S9: leaving a step detaches it, and entering attaches it again")
