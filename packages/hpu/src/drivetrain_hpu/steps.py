"""What Gaudi adds around the toolkit's eager steps: marks, fused clipping, and kept gradients.

In eager mode there is nothing to add, and the toolkit's steps run as they are. In lazy mode
operations collect until ``mark_step()``: it is called after each backward, after each update and
after each evaluation, in this order and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from drivetrain_interfaces import Clip, StepHooks, StepResult, StepSpec
    from torch import Tensor
    from torch.optim import Optimizer
    from typing_extensions import Self

    Mark = Callable[[], Any]


class MarkedStep:
    """A train or evaluation step, followed by a mark."""

    __slots__ = ("_after", "_step")

    def __init__(self, step: Any, after: Sequence[Callable[[Any], Any]]) -> None:
        self._step = step
        self._after = tuple(after)

    def __call__(self, *args: Any) -> Any:
        """Run the step, and what comes after it on its result."""
        result = self._step(*args)
        for each in self._after:
            result = each(result)
        return result

    def __enter__(self) -> Self:
        self._step.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._step.__exit__(*exc)


class MarkedManualStep(MarkedStep):
    """A manual step with the same marks: after each backward, update and call."""

    __slots__ = ("_mark",)

    def __init__(self, step: Any, mark: Mark) -> None:
        super().__init__(step, ())
        self._mark = mark

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, and mark."""
        self._step.backward(loss)
        self._mark()

    def update(self, optimizer: Optimizer, clip: Clip | None = None) -> StepResult | None:
        """Update, and mark."""
        result: StepResult | None = self._step.update(optimizer, clip)
        self._mark()
        return result


def marking(mark: Mark) -> Callable[[Any], Any]:
    """What calls ``mark`` after a step and hands its result on."""

    def after(result: Any) -> Any:
        mark()
        return result

    return after


def mark_backward(spec: StepSpec, mark: Mark) -> StepSpec:
    """The spec with a mark after each backward, behind the user's own hook."""
    user = spec.hooks.after_backward

    def after_backward() -> None:
        if user is not None:
            user()
        mark()

    return replace(spec, hooks=replace(spec.hooks, after_backward=after_backward))


class FusedClip:
    """Clips by the vendor's fused kernel, in place of the toolkit's clipping.

    Args:
        kind: The class ``FusedClipNorm``.
        limit: The largest norm.
    """

    def __init__(self, kind: Callable[..., Any], limit: float) -> None:
        self._kind = kind
        self._limit = limit
        self._clipper: Any = None
        self._norm: Tensor | None = None

    def around(self, hooks: StepHooks) -> StepHooks:
        """The hooks with clipping as the last thing before the update."""
        user = hooks.before_optimizer_step

        def before_optimizer_step(optimizers: Sequence[Optimizer]) -> None:
            if user is not None:
                user(optimizers)
            self._clip(optimizers)

        return replace(hooks, before_optimizer_step=before_optimizer_step)

    def report(self, result: StepResult) -> StepResult:
        """The result with the norm, which the step itself does not know of."""
        return replace(result, grad_norm=self._norm)

    def _clip(self, optimizers: Sequence[Optimizer]) -> None:
        # A list: the vendor's function goes over it more than once, and would use up an iterator.
        parameters = [
            p
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if self._clipper is None:
            self._clipper = self._kind(parameters, self._limit)
        self._norm = self._clipper.clip_norm(parameters)


class KeptGradients:
    """Gradients that stay where they are between steps, as replayed graphs need them.

    The toolkit's steps drop gradients after each update. Here they are zeroed and put back.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.nn.Parameter, Tensor]] = []

    def around(self, hooks: StepHooks) -> StepHooks:
        """The hooks, with a look at the gradients before they are dropped."""
        user = hooks.before_zero_grad

        def before_zero_grad(optimizers: Sequence[Optimizer]) -> None:
            if user is not None:
                user(optimizers)
            self._kept = [
                (p, p.grad)
                for optimizer in optimizers
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            ]

        return replace(hooks, before_zero_grad=before_zero_grad)

    def restore(self, result: StepResult) -> StepResult:
        """Put them back, as zeros."""
        with torch.no_grad():
            for parameter, grad in self._kept:
                parameter.grad = grad.zero_()
        self._kept = []
        return result


def windows(step: Callable[[Collection[Any]], StepResult], after: Sequence[Any]) -> Any:
    """The step itself where nothing follows it."""
    return MarkedStep(step, after) if after else step
