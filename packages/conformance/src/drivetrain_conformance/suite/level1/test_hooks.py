"""User code inside a step: called in order, exactly once, and shown the right thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces import Clip, Feature, StepHook, StepHooks

from drivetrain_conformance.reference import distance, train_by_hand
from drivetrain_conformance.support.problems import mean_square, microbatches, perceptron

if TYPE_CHECKING:
    import torch

    from drivetrain_conformance.fixtures import Build
    from drivetrain_conformance.target import Target

LR = 0.5


def recording(target: Target, notes: list[str]) -> StepHooks:
    """Every declared hook, noting that it was called."""

    def hook(name: str) -> Any:
        return lambda *_: notes.append(name)

    return StepHooks(**{h.value: hook(h.value) for h in target.capabilities.hooks})


def expected(target: Target, microbatch_count: int) -> list[str]:
    """The calls of one window, without hooks that are not declared."""
    each = ["forward", "before_backward", "after_backward"]
    once = ["before_optimizer_step", "before_zero_grad"]
    declared = {"forward", *(hook.value for hook in target.capabilities.hooks)}
    return [name for name in [*(each * microbatch_count), *once] if name in declared]


def noting(notes: list[str]) -> Any:
    """The loss, noting that it was called."""

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        notes.append("forward")
        return mean_square(module, item)

    return loss


def test_hooks_are_called_in_order_and_once(build: Build, target: Target) -> None:
    """An override that is never called is a bug that nobody sees.

    R: S9
    """
    notes: list[str] = []
    setup = build(loss=noting(notes), hooks=recording(target, notes))
    with setup.step:
        setup.step([setup.strategy.feed(microbatches(1)[0])])
    assert notes == expected(target, 1), (
        f"S9: user code in a step is called in this order, once each: {expected(target, 1)}; "
        f"the step called {notes}"
    )


@pytest.mark.needs(Feature.ACCUMULATION)
def test_hooks_of_a_window_are_called_in_order_and_once(build: Build, target: Target) -> None:
    """Backward hooks once for each microbatch, the others once for the window.

    R: S9
    """
    notes: list[str] = []
    setup = build(accumulate=3, loss=noting(notes), hooks=recording(target, notes))
    with setup.step:
        setup.step([setup.strategy.feed(item) for item in microbatches(2)])
    assert notes == expected(target, 2), (
        f"S9: user code in a window of two is called in this order: {expected(target, 2)}; the "
        f"step called {notes}"
    )


def test_hooks_get_what_they_are_about(build: Build, target: Target) -> None:
    """The loss with its graph, and the optimizers of the step.

    R: S9, S10
    """
    seen: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Any:
        return lambda *args: seen.update({name: args})

    hooks = StepHooks(**{h.value: keep(h.value) for h in target.capabilities.hooks})
    setup = build(hooks=hooks)
    setup.train([microbatches(1)])
    if "before_backward" in seen:
        (loss,) = seen["before_backward"]
        assert loss.requires_grad, "S10: before_backward gets the loss with its graph"
        assert loss.numel() == 1, f"S10: before_backward gets a scalar; its shape is {loss.shape}"
    if "after_backward" in seen:
        assert seen["after_backward"] == (), "S9: after_backward gets nothing"
    for name in {"before_optimizer_step", "before_zero_grad"} & set(seen):
        (optimizers,) = seen[name]
        same = [a is b for a, b in zip(optimizers, setup.optimizers, strict=True)]
        assert all(same), f"S9: {name} gets the optimizers of the step, the very objects"


@pytest.mark.needs(StepHook.BEFORE_BACKWARD)
def test_the_loss_that_a_hook_sees_is_undivided_and_unscaled(
    build: Build, target: Target, declared_precision: str
) -> None:
    """It is what the user's own function returned.

    R: S10
    """
    seen: list[float] = []
    count = 2 if target.declares(Feature.ACCUMULATION) else 1
    windows = [microbatches(count)]
    hooks = StepHooks(before_backward=lambda loss: seen.append(float(loss.detach())))
    setup = build(declared_precision, accumulate=count, hooks=hooks)
    with setup.step:
        setup.step([setup.strategy.feed(item) for item in windows[0]])
    for item, loss in zip(windows[0], seen, strict=True):
        wanted = train_by_hand(perceptron(), [[item]], mean_square, lr=LR).losses[0]
        assert loss == pytest.approx(wanted, rel=setup.tolerance.loss), (
            f"S10: before_backward gets the undivided, unscaled loss, {wanted:.6g}; it got "
            f"{loss:.6g} in {declared_precision}"
        )


@pytest.mark.needs(StepHook.BEFORE_OPTIMIZER_STEP)
def test_the_gradients_that_a_hook_sees_are_unscaled_and_not_clipped(
    build: Build, target: Target, declared_precision: str
) -> None:
    """In every precision, and before clipping.

    R: S10, P11
    """
    seen: list[dict[str, torch.Tensor]] = []

    def look(_: Any) -> None:
        graded = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        seen.append({name: grad.detach().to("cpu", copy=True) for name, grad in graded.items()})

    clip = Clip(0.25) if target.declares(Feature.CLIP_NORM) else None
    windows = [microbatches(1)]
    setup = build(declared_precision, clip=clip, hooks=StepHooks(before_optimizer_step=look))
    module = setup.module
    setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR).gradients[0]
    assert seen, "S9: before_optimizer_step is called"
    assert set(seen[-1]) == set(wanted), (
        f"S10: before_optimizer_step sees all gradients; it saw {sorted(seen[-1])}"
    )
    apart = distance(seen[-1], wanted)
    assert apart <= setup.tolerance.update, (
        f"S10: before_optimizer_step sees gradients that are complete, unscaled and not yet "
        f"clipped; they are off by {apart:.3g} of their length in {declared_precision}"
    )


@pytest.mark.needs(StepHook.BEFORE_OPTIMIZER_STEP)
def test_a_hook_may_change_the_gradients(build: Build) -> None:
    """Noise, freezing and own clipping are done there.

    R: S10
    """

    def halve(optimizers: Any) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)

    windows = [microbatches(1)]
    setup = build(hooks=StepHooks(before_optimizer_step=halve))
    results = setup.train(windows)
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR / 2)
    setup.check(results, wanted, "S10: what before_optimizer_step makes of gradients is applied")


@pytest.mark.needs(StepHook.BEFORE_OPTIMIZER_STEP, Feature.CLIP_NORM)
def test_clipping_comes_after_the_hook(build: Build) -> None:
    """The limit holds for what is applied.

    R: S9, S10
    """

    def enlarge(optimizers: Any) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(1000.0)

    windows = [microbatches(1)]
    setup = build(clip=Clip(0.25), hooks=StepHooks(before_optimizer_step=enlarge))
    setup.train(windows)
    # 1000 times the gradient points the same way, and is clipped to the same length.
    wanted = train_by_hand(perceptron(), windows, mean_square, lr=LR, clip=Clip(0.25))
    rule = "S9: gradients are clipped after before_optimizer_step"
    setup.check_way(wanted, rule, at_least=2e-5)  # torch divides by the norm plus 1e-6


@pytest.mark.needs(StepHook.BEFORE_OPTIMIZER_STEP, StepHook.BEFORE_ZERO_GRAD)
def test_the_update_lies_between_its_hooks(build: Build) -> None:
    """Parameters are the old ones before, and the new ones after, with gradients still there.

    R: S9, S11
    """
    before: list[bool] = []
    after: list[bool] = []
    graded: list[bool] = []

    def moved() -> bool:
        now = setup.parameters()
        return any(not now[name].equal(value) for name, value in setup.start.items())

    def look_after(_: Any) -> None:
        after.append(moved())
        graded.append(all(p.grad is not None for p in setup.module.parameters()))

    setup = build(
        hooks=StepHooks(
            before_optimizer_step=lambda _: before.append(moved()), before_zero_grad=look_after
        )
    )
    setup.train([microbatches(1)])
    assert not before[0], "S9: before_optimizer_step comes before the update"
    assert after[-1], "S9: before_zero_grad comes after the update"
    assert graded[-1], "S9: before_zero_grad comes before gradients are cleared"


@pytest.mark.parametrize(
    "hook", [pytest.param(h, marks=pytest.mark.needs(h), id=h.value) for h in StepHook]
)
def test_an_error_in_a_hook_reaches_the_user(build: Build, hook: StepHook) -> None:
    """Unchanged; and it leaves no gradients behind.

    R: S11
    """

    def fail(*_: Any) -> None:
        raise OSError("the user's own")

    setup = build(hooks=StepHooks(**{hook.value: fail}))
    fed = [setup.strategy.feed(microbatches(1)[0])]
    with setup.step, pytest.raises(OSError, match="the user's own"):
        setup.step(fed)
    assert all(p.grad is None for p in setup.module.parameters()), (
        f"S11: gradients are cleared also when user code raised, here in {hook.value}"
    )
