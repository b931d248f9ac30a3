"""Manual steps: the user's code calls backward and the optimizers itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import (
    Clip,
    Feature,
    ManualSpec,
    ManualStep,
    SupportsManualStep,
    UserCodeError,
)

from drivetrain_conformance.reference import distance, train_by_hand, way
from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import (
    mean_square,
    microbatches,
    parameters_of,
    perceptron,
    sgd,
)
from drivetrain_conformance.support.tolerances import tolerance

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

    from drivetrain_conformance.fixtures import Bind

pytestmark = pytest.mark.needs(Feature.MANUAL_STEP)

LR = 0.5


def manual(bind: Bind, precision: Any = None) -> Any:
    """A bound strategy that offers manual steps."""
    strategy = bind(precision)
    assert isinstance(strategy, SupportsManualStep), (
        f"S25: a strategy that declares manual steps has manual_step; {type(strategy).__name__} "
        "has not"
    )
    return strategy


def made(
    bind: Bind, precision: Any = None, function: Any = mean_square
) -> tuple[Any, Any, Any, Any]:
    """A strategy, its module, an optimizer and a manual step."""
    strategy = manual(bind, precision)
    module = strategy.prepare(perceptron())
    optimizer = sgd(module)
    step = strategy.manual_step(ManualSpec(module, [optimizer], function))
    return strategy, module, optimizer, step


def test_a_manual_step_trains_as_by_hand(
    bind: Bind, backend: Backend, declared_precision: str
) -> None:
    """Forward in the precision's context, backward scaled as it needs, update unscaled.

    R: S25, S26
    """
    strategy, module, optimizer, step = made(bind, declared_precision)
    assert isinstance(step, ManualStep), "S25: a manual step has all members of ManualStep"
    before = parameters_of(module)
    windows = [[batch] for batch in microbatches(3)]
    with step:
        for (batch,) in windows:
            for _ in range(40):  # a loss scale may have to find itself
                step.backward(step(strategy.feed(batch)))
                result = step.update(optimizer)
                optimizer.zero_grad()
                if result is None or result.applied:
                    break
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR)
    apart = distance(way(before, parameters_of(module)), way(wanted.start, wanted.end))
    tolerated = tolerance(backend.precision(declared_precision).policy).update
    assert apart <= tolerated, (
        f"S26: update unscales and steps one optimizer; parameters are {apart:.3g} of their way "
        f"off in {declared_precision}, and {tolerated:g} is tolerated"
    )


def test_gradients_are_left_for_the_user(bind: Bind) -> None:
    """To clear, or to add to.

    R: S26
    """
    strategy, module, optimizer, step = made(bind)
    with step:
        step.backward(step(strategy.feed(microbatches(1)[0])))
        step.update(optimizer)
    assert all(p.grad is not None for p in module.parameters()), (
        "S26: gradients are left for the user to clear"
    )


def test_only_the_optimizer_that_was_named_updates(bind: Bind) -> None:
    """A generator and a discriminator take turns.

    R: S26
    """
    strategy = manual(bind)
    module = strategy.prepare(perceptron())
    first, second = list(module.parameters())[:2], list(module.parameters())[2:]
    optimizers = [torch.optim.SGD(first, LR), torch.optim.SGD(second, LR)]
    before = parameters_of(module)
    with strategy.manual_step(ManualSpec(module, optimizers, mean_square)) as step:
        step.backward(step(strategy.feed(microbatches(1)[0])))
        step.update(optimizers[1])
    moved = [not p.equal(before[name]) for name, p in parameters_of(module).items()]
    assert moved == [False, False, True, True], "S26: update steps one optimizer, and no other"


def test_a_manual_update_clips(bind: Bind) -> None:
    """By norm, which comes back.

    R: S26, S20
    """
    strategy, module, optimizer, step = made(bind)
    before = parameters_of(module)
    windows = [microbatches(1)]
    with step:
        step.backward(step(strategy.feed(windows[0][0])))
        result = step.update(optimizer, Clip(0.125))
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, clip=Clip(0.125))
    apart = distance(way(before, parameters_of(module)), way(wanted.start, wanted.end))
    assert apart < 0.1, f"S26: update clips; parameters went {apart:.3g} of their way off"  # noqa: PLR2004 - without clipping it is far more
    assert result is not None, "S26: an update that clips by norm returns the norm"
    assert float(result.grad_norm) == pytest.approx(wanted.norms[0], rel=0.1), (
        "S20: grad_norm is the norm before clipping"
    )


@pytest.mark.parametrize("bad", [None, 1.0], ids=["nothing", "number"])
def test_a_manual_loss_that_cannot_be_used_is_refused(bind: Bind, bad: Any) -> None:
    """As in a train step.

    R: S25, S12
    """
    _, _, _, step = made(bind)
    with step, refused(UserCodeError, naming="loss", rule="S25: backward checks the loss"):
        step.backward(bad)


def test_an_optimizer_that_the_step_does_not_know_is_refused(bind: Bind) -> None:
    """It would be neither saved nor restored.

    R: S27
    """
    _, module, _, step = made(bind)
    rule = "S27: an optimizer that the step was not built with is refused"
    with step, refused(UserCodeError, naming="optimizer", rule=rule):
        step.update(sgd(module))


def test_the_function_gets_its_arguments(bind: Bind) -> None:
    """And the step returns what it returned.

    R: S25
    """
    strategy = manual(bind)
    module = strategy.prepare(perceptron())
    step = strategy.manual_step(
        ManualSpec(module, [sgd(module)], lambda given, *args: (given is module, args))
    )
    with step:
        assert step(1, "two") == (True, (1, "two")), (
            "S25: a manual step runs the user's function with the module and its arguments"
        )


def test_losses_that_went_backward_together_are_unscaled_alike(
    bind: Bind, scaled_precision: str
) -> None:
    """Also if the first of two updates was not finite.

    R: P12, P10
    """
    strategy = manual(bind, scaled_precision)
    module = strategy.prepare(perceptron())
    first, second = list(module.parameters())[:2], list(module.parameters())[2:]
    optimizers = [torch.optim.SGD(first, LR), torch.optim.SGD(second, LR)]
    item = microbatches(1)[0]
    with strategy.manual_step(ManualSpec(module, optimizers, mean_square)) as step:
        for _ in range(40):  # until the scale fits, with gradients that are finite
            for optimizer in optimizers:
                optimizer.zero_grad()
            step.backward(step(strategy.feed(item)))
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if all(torch.isfinite(grad).all() for grad in grads):
                break
            for optimizer in optimizers:
                step.update(optimizer)
        first[0].grad.fill_(float("inf"))
        before = parameters_of(module)
        broken, good = step.update(optimizers[0]), step.update(optimizers[1])
    assert broken is not None, "P10: an update that is not finite says so"
    assert not broken.applied, "P10: an update that is not finite is not applied"
    assert good is None or good.applied, "P10: the other optimizer's update is finite"
    twin = perceptron()
    twin.load_state_dict(before)
    wanted = train_by_hand(twin, [[item]], mean_square, lr=LR)
    names = ["2.weight", "2.bias"]
    went = way({n: before[n] for n in names}, {n: parameters_of(module)[n] for n in names})
    by_hand = way({n: wanted.start[n] for n in names}, {n: wanted.end[n] for n in names})
    apart = distance(went, by_hand)
    assert apart < 0.05, (  # noqa: PLR2004 - a scale that shrank in between is off by one half
        f"P12: the scale changes only before the next backward; the second update is {apart:.3g} "
        "of its length off"
    )
