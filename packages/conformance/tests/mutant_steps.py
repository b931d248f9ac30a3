"""Train steps, evaluation steps and manual steps that each break one rule."""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import Clip, EvalSpec, StepHooks, StepResult, StepSpec
from drivetrain_toolkit.checks import counted
from drivetrain_toolkit.clipping import clip_by_norm, gradients
from drivetrain_toolkit.steps import EagerEvalStep, EagerManualStep, EagerTrainStep, make_train_step
from drivetrain_toolkit.strategies import SingleDeviceStrategy
from mutant_parts import Good
from mutant_parts import strategies as both

if TYPE_CHECKING:
    from collections.abc import Callable


def changing(
    spec: Callable[[StepSpec], StepSpec] | None = None,
    result: Callable[[StepResult], StepResult] | None = None,
    step: Any = None,
    call: Callable[[Any, Any, StepSpec], StepResult] | None = None,
) -> dict[str, Any]:
    """Strategies with another train step on one device.

    Args:
        spec: Makes another spec of the one that was asked for.
        result: Makes another result of each.
        step: Another class of step, for optimizers without a closure.
        call: Called instead of the step, with the step, the window and the spec.
    """

    class Changed(SingleDeviceStrategy):
        def train_step(self, asked: StepSpec) -> Any:
            built = super().train_step(asked if spec is None else spec(asked))
            if step is not None and type(built) is EagerTrainStep:
                make_train_step(asked, self.context.precision)
                built = step(asked, self.context.precision)
            return Around(built, asked, result, call)

    return both(Changed)


class Around:
    """A step with something before or after it."""

    def __init__(self, step: Any, spec: StepSpec, result: Any, call: Any) -> None:
        self.step, self.spec, self.result, self.call = step, spec, result, call

    def __enter__(self) -> Any:
        self.step.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.step.__exit__(*exc)

    def __call__(self, microbatches: Any) -> StepResult:
        if self.call is not None:
            return self.call(self.step, microbatches, self.spec)
        given = self.step(microbatches)
        return given if self.result is None else self.result(given)


def hooked(spec: StepSpec, **hooks: Any) -> StepSpec:
    """The spec with other hooks."""
    return replace(spec, hooks=replace(spec.hooks, **hooks))


def parameters(spec: StepSpec) -> list[torch.Tensor]:
    """Everything that the optimizers update."""
    return [p for o in spec.optimizers for g in o.param_groups for p in g["params"]]


# What is computed


class Sums(EagerTrainStep):
    __slots__ = ()

    def _accumulate_alike(self, microbatches: Any, count: int) -> torch.Tensor:
        losses = [self._differentiate(m, None) for m, _ in counted(microbatches, count)]
        return torch.stack(losses).mean()


class sums_microbatches(Good):
    strategies = changing(step=Sums)


class TailAsAWhole(EagerTrainStep):
    __slots__ = ()

    def _accumulate_alike(self, microbatches: Any, count: int) -> torch.Tensor:
        share = 1.0 / self._accumulate_at_most
        losses = [self._differentiate(m, share) for m, _ in counted(microbatches, count)]
        return torch.stack(losses).mean()


class divides_the_tail_by_the_window(Good):
    strategies = changing(step=TailAsAWhole)


class MultipliesOne(EagerTrainStep):
    __slots__ = ()

    def __call__(self, microbatches: Any) -> StepResult:
        if self._accumulate_at_most == 1 or len(microbatches) != 1:
            return super().__call__(microbatches)
        before, self._forward = self._forward, lambda m: before(m) * (1.0 + 2.0**-22)
        try:
            return super().__call__(microbatches)
        finally:
            self._forward = before


class multiplies_a_window_of_one(Good):
    strategies = changing(step=MultipliesOne)


class ignores_weights(Good):
    strategies = changing(spec=lambda s: replace(s, weight=None))


class takes_any_weight(Good):
    strategies = changing(
        spec=lambda s: replace(
            s, weight=None if s.weight is None else lambda m: forgiven(s.weight(m))
        )
    )


def forgiven(weight: float) -> float:
    """A weight that nobody minds."""
    return weight if 0 < weight < float("inf") else 1.0 if weight else 1e-12


class Ahead:
    """A window that is drawn from before it is used."""

    def __init__(self, window: Any) -> None:
        self.length, self.items = len(window), list(window)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return iter(self.items)


class draws_ahead(Good):
    strategies = changing(call=lambda step, window, _: step(Ahead(window)))


class FirstOnly(EagerTrainStep):
    __slots__ = ()

    def _accumulate(self, microbatches: Any, count: int) -> torch.Tensor:
        self._check_count(count)
        first, *_ = [m for m, _ in counted(microbatches, count)]
        return self._differentiate(first, None)


class trains_on_the_first_microbatch(Good):
    strategies = changing(step=FirstOnly)


class AnyWindow(EagerTrainStep):
    __slots__ = ()

    def __call__(self, microbatches: Any) -> StepResult:
        window = list(microbatches)
        self._accumulate_at_most = max(1, len(window))
        if not window:
            return StepResult(torch.zeros(()), applied=False)
        return super().__call__(window)


class takes_any_window(Good):
    strategies = changing(step=AnyWindow)


def averaged(spec: StepSpec) -> StepSpec:
    """A spec whose loss takes whatever the user returned."""

    def loss(module: Any, microbatch: Any) -> Any:
        value = spec.loss(module, microbatch)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return value.mean()
        return next(module.parameters()).sum() * 0.0

    return replace(spec, loss=loss)


class takes_any_loss(Good):
    strategies = changing(spec=averaged)


# What comes out


class result_keeps_the_graph(Good):
    strategies = changing(result=lambda r: replace(r, loss=r.loss.clone().requires_grad_()))


class result_is_a_number(Good):
    strategies = changing(result=lambda r: replace(r, loss=float(r.loss)))


class result_is_the_loss(Good):
    strategies = changing(result=lambda r: r.loss)


class loss_is_that_of_the_last(Good):
    class Last(EagerTrainStep):
        __slots__ = ()

        def _accumulate(self, microbatches: Any, count: int) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            original = self._forward

            def forward(microbatch: Any) -> torch.Tensor:
                seen.append(original(microbatch))
                return seen[-1]

            self._forward = forward
            try:
                super()._accumulate(microbatches, count)
            finally:
                self._forward = original
            return seen[-1].detach()

    strategies = changing(step=Last)


class norm_without_clipping(Good):
    strategies = changing(
        result=lambda r: r if r.grad_norm is not None else replace(r, grad_norm=torch.ones(()))
    )


class norm_after_clipping(Good):
    class After(EagerTrainStep):
        __slots__ = ()

        def _ready(self) -> None:
            super()._ready()
            if self._grad_norm is not None:
                self._grad_norm = clip_by_norm(gradients(self._optimizers), 1e9)

    strategies = changing(step=After)


# Gradients


def keep_gradients(step: Any, window: Any, spec: StepSpec) -> StepResult:
    """Train, and leave the gradients where they were."""
    kept: list[Any] = []
    step._before_zero_grad, user = (
        lambda o: (user and user(o), kept.extend(p.grad for p in parameters(spec))),
        step._before_zero_grad,
    )
    try:
        return step(window)
    finally:
        step._before_zero_grad = user
        for parameter, grad in zip(parameters(spec), kept, strict=False):
            parameter.grad = grad


class leaves_gradients(Good):
    strategies = changing(call=keep_gradients)


class Zeros(EagerTrainStep):
    __slots__ = ()

    def __call__(self, microbatches: Any) -> StepResult:
        given = super().__call__(microbatches)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        return given


class sets_gradients_to_zero(Good):
    strategies = changing(step=Zeros)


class ClearsOnlyWhenWell(EagerTrainStep):
    __slots__ = ()

    def __call__(self, microbatches: Any) -> StepResult:
        kept: list[Any] = []
        owned = [p for o in self._optimizers for g in o.param_groups for p in g["params"]]
        backward = self._backward

        def noting(loss: torch.Tensor) -> None:
            backward(loss)
            kept[:] = [None if p.grad is None else p.grad.clone() for p in owned]

        self._backward = noting
        try:
            return super().__call__(microbatches)
        except BaseException:
            for parameter, grad in zip(owned, kept, strict=False):
                parameter.grad = grad
            raise
        finally:
            self._backward = backward


class leaves_gradients_of_a_broken_window(Good):
    strategies = changing(step=ClearsOnlyWhenWell)


class ignores_clipping(Good):
    strategies = changing(spec=lambda s: replace(s, clip=None))


class clips_by_norm_only(Good):
    strategies = changing(spec=lambda s: replace(s, clip=Clip(s.clip.value)) if s.clip else s)


def clipped_alone(spec: StepSpec) -> StepSpec:
    """Every parameter clipped by a norm of its own."""
    if spec.clip is None or spec.clip.by != "norm":
        return spec
    user, limit = spec.hooks.before_optimizer_step, spec.clip.value

    def clip(optimizers: Any) -> None:
        if user:
            user(optimizers)
        for parameter in parameters(spec):
            if parameter.grad is not None:
                clip_by_norm([parameter.grad], limit)

    return hooked(spec, before_optimizer_step=clip)


class clips_each_parameter(Good):
    strategies = changing(spec=clipped_alone)


def clipped_early(spec: StepSpec) -> StepSpec:
    """Clipped after each backward rather than once."""
    if spec.clip is None or spec.clip.by != "norm":
        return spec
    user, limit = spec.hooks.after_backward, spec.clip.value

    def clip() -> None:
        if user:
            user()
        clip_by_norm([p.grad for p in parameters(spec) if p.grad is not None], limit)

    return hooked(spec, after_backward=clip)


class clips_each_microbatch(Good):
    strategies = changing(spec=clipped_early)


def clipped_first(spec: StepSpec) -> StepSpec:
    """Clipped before the user's hook, and not after it."""
    user, limit = spec.hooks.before_optimizer_step, spec.clip
    if user is None or limit is None or limit.by != "norm":
        return spec

    def clip(optimizers: Any) -> None:
        clip_by_norm(gradients(optimizers), limit.value)
        user(optimizers)

    return replace(hooked(spec, before_optimizer_step=clip), clip=None)


class clips_before_the_hook(Good):
    strategies = changing(spec=clipped_first)


class Anyhow(SingleDeviceStrategy):
    def train_step(self, spec: StepSpec) -> Any:
        strange = spec.clip and (spec.clip.by not in {"norm", "value"} or not spec.clip.value > 0)
        return super().train_step(replace(spec, clip=None) if strange else spec)


class takes_any_clipping(Good):
    strategies = both(Anyhow)


# Hooks


class skips_before_backward(Good):
    strategies = changing(spec=lambda s: hooked(s, before_backward=None))


class skips_after_backward(Good):
    strategies = changing(spec=lambda s: hooked(s, after_backward=None))


class skips_before_optimizer_step(Good):
    strategies = changing(spec=lambda s: hooked(s, before_optimizer_step=None))


class skips_before_zero_grad(Good):
    strategies = changing(spec=lambda s: hooked(s, before_zero_grad=None))


def twice(call: Any) -> Any:
    """The same call, made twice."""
    return None if call is None else lambda *args: (call(*args), call(*args))


class calls_a_hook_twice(Good):
    strategies = changing(spec=lambda s: hooked(s, after_backward=twice(s.hooks.after_backward)))


def swapped(spec: StepSpec) -> StepSpec:
    """The last two hooks in the other order."""
    hooks = spec.hooks
    return hooked(
        spec,
        before_optimizer_step=hooks.before_zero_grad,
        before_zero_grad=hooks.before_optimizer_step,
    )


class calls_hooks_in_another_order(Good):
    strategies = changing(spec=swapped)


class shows_a_divided_loss(Good):
    strategies = changing(
        spec=lambda s: hooked(
            s,
            before_backward=s.hooks.before_backward
            and (lambda loss: s.hooks.before_backward(loss / s.accumulate)),
        )
    )


class shows_a_copy_of_gradients(Good):
    """What the hook makes of gradients is lost."""

    class Copies(EagerTrainStep):
        __slots__ = ()

        def _ready(self) -> None:
            kept = [g.clone() for g in gradients(self._optimizers)]
            if self._before_step is not None:
                self._before_step(self._optimizers)
            for grad, old in zip(gradients(self._optimizers), kept, strict=True):
                grad.copy_(old)
            user, self._before_step = self._before_step, None
            try:
                super()._ready()
            finally:
                self._before_step = user

    strategies = changing(step=Copies)


def quiet(call: Any) -> Any:
    """The same call, whose errors nobody hears of."""
    if call is None:
        return None

    def run(*args: Any) -> None:
        with suppress(Exception):  # that is what is broken here
            call(*args)

    return run


class swallows_errors_of_hooks(Good):
    strategies = changing(
        spec=lambda s: replace(
            s, hooks=StepHooks(**{n: quiet(getattr(s.hooks, n)) for n in s.hooks.__slots__})
        )
    )


# Optimizers


class updates_the_first_optimizer(Good):
    strategies = changing(spec=lambda s: replace(s, optimizers=list(s.optimizers)[:1]))


class StepsOnce(SingleDeviceStrategy):
    """Gives an optimizer with a closure the gradients of one evaluation."""

    def train_step(self, spec: StepSpec) -> Any:
        built = super().train_step(spec)
        if type(built) is EagerTrainStep:
            return built
        (optimizer,) = spec.optimizers
        optimizer.param_groups[0]["max_iter"] = 1
        return built


class evaluates_a_closure_once(Good):
    strategies = both(StepsOnce)


class ForgetsClosures(SingleDeviceStrategy):
    def train_step(self, spec: StepSpec) -> Any:
        if len(spec.optimizers) > 1:
            kept = [o for o in spec.optimizers if not isinstance(o, torch.optim.LBFGS)]
            spec = replace(spec, optimizers=kept)
        return super().train_step(spec)


class forgets_an_optimizer_with_a_closure(Good):
    strategies = both(ForgetsClosures)


class Decays(EagerTrainStep):
    """Moves parameters that have no gradient."""

    __slots__ = ()

    def __call__(self, microbatches: Any) -> StepResult:
        given = super().__call__(microbatches)
        with torch.no_grad():
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(1 - 1e-3)
        return given


class decays_all_parameters(Good):
    strategies = changing(step=Decays)


CHANCE = random.SystemRandom()


class never_the_same_twice(Good):
    strategies = changing(
        spec=lambda s: replace(
            s, loss=lambda m, item: s.loss(m, item) * (1.0 + 1e-6 * CHANCE.random())
        )
    )


class Tires(EagerTrainStep):
    """Learns less after the sixth update."""

    __slots__ = ("_updates",)

    def __call__(self, microbatches: Any) -> StepResult:
        self._updates = getattr(self, "_updates", 0) + 1
        return super().__call__(microbatches)

    def _ready(self) -> None:
        super()._ready()
        for grad in gradients(self._optimizers):
            grad.mul_(1.0 if self._updates < 7 else 0.5)

    def __init__(self, spec: StepSpec, precision: Any) -> None:
        super().__init__(spec, precision)
        self._prepare = self._ready


class tires_of_training(Good):
    strategies = changing(step=Tires)


# Evaluation and manual steps


def evaluating(step: Callable[[EvalSpec, Any], Any]) -> dict[str, Any]:
    """Strategies with another evaluation step."""

    class Changed(SingleDeviceStrategy):
        def eval_step(self, spec: EvalSpec) -> Any:
            return step(spec, self.context.precision)

    return both(Changed)


class WithGradients(EagerEvalStep):
    __slots__ = ()

    def __init__(self, spec: EvalSpec, precision: Any) -> None:
        super().__init__(spec, precision)
        self._no_grad = nullcontext


class evaluates_with_gradients(Good):
    strategies = evaluating(WithGradients)


class NoAutocast(EagerEvalStep):
    __slots__ = ()

    def __init__(self, spec: EvalSpec, precision: Any) -> None:
        super().__init__(spec, precision)
        self._autocast = nullcontext


class evaluates_in_another_format(Good):
    strategies = evaluating(NoAutocast)


class SwitchesMode(EagerEvalStep):
    __slots__ = ("_module",)

    def __init__(self, spec: EvalSpec, precision: Any) -> None:
        super().__init__(spec, precision)
        self._module = spec.module

    def __call__(self, *args: Any) -> Any:
        self._module.eval()
        return super().__call__(*args)


class switches_the_mode_of_the_module(Good):
    strategies = evaluating(SwitchesMode)


class NeverInfers(EagerEvalStep):
    __slots__ = ()

    def __init__(self, spec: EvalSpec, precision: Any) -> None:
        super().__init__(replace(spec, inference_mode=False), precision)


class ignores_inference_mode(Good):
    strategies = evaluating(NeverInfers)


def stepping(step: Any) -> dict[str, Any]:
    """Strategies with another manual step."""

    class Changed(SingleDeviceStrategy):
        def manual_step(self, spec: Any) -> Any:
            super().manual_step(spec)
            return step(spec, self.context.precision)

    return both(Changed)


class ManualClears(EagerManualStep):
    __slots__ = ()

    def update(self, optimizer: Any, clip: Clip | None = None) -> StepResult:
        given = super().update(optimizer, clip)
        optimizer.zero_grad(set_to_none=True)
        return given


class manual_update_clears(Good):
    strategies = stepping(ManualClears)


class ManualStranger(EagerManualStep):
    __slots__ = ()

    def update(self, optimizer: Any, clip: Clip | None = None) -> StepResult:
        self._optimizers = (*self._optimizers, optimizer)
        return super().update(optimizer, clip)


class manual_update_of_a_stranger(Good):
    strategies = stepping(ManualStranger)


class ManualUnclipped(EagerManualStep):
    __slots__ = ()

    def update(self, optimizer: Any, clip: Clip | None = None) -> StepResult:
        return super().update(optimizer, None)


class manual_update_ignores_clipping(Good):
    strategies = stepping(ManualUnclipped)


class ManualPlainBackward(EagerManualStep):
    __slots__ = ()

    def backward(self, loss: torch.Tensor) -> None:
        loss.mean().backward()


class manual_backward_takes_anything(Good):
    strategies = stepping(ManualPlainBackward)
