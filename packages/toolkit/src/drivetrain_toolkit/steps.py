"""Eager steps: forward, backward and update in one call. Rules are in docs/contracts/strategy.md.

The order of everything is here and nowhere else. What a strategy adds, it passes in: a ``forward``
to call instead of the loss function, and a ``no_sync`` context for microbatches that only
accumulate.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from drivetrain_interfaces import (
    DataError,
    ReduceOp,
    StepResult,
    UnsupportedError,
    UserCodeError,
)
from torch import Tensor

from drivetrain_toolkit.averaging import average_gradients
from drivetrain_toolkit.checks import (
    check_spec,
    counted,
    miscounted,
    needs_closure,
    released,
    usable_loss,
    usable_weight,
)
from drivetrain_toolkit.clipping import (
    check_clip,
    clip_by_norm,
    clip_by_value,
    gradients,
    scale,
    total_norm,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager

    from drivetrain_interfaces import (
        Clip,
        Collectives,
        EvalSpec,
        ManualSpec,
        Precision,
        StepSpec,
    )
    from torch.optim import Optimizer
    from typing_extensions import Self

_NOTHING = nullcontext()


class Update(Protocol):
    """How optimizers update; ``Precision.step`` is one."""

    def __call__(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Unscale, call ``prepare``, update; whether the update was applied."""
        ...


class GradientParts(Protocol):
    """The gradients of which this rank holds parts, and other ranks the others."""

    def gradients(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """This rank's parts, as plain tensors that share memory with the gradients."""
        ...

    def pending(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """What a window has left so far, before ranks average it."""
        ...

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The total norm over all ranks' parts; ``grads`` is what ``gradients`` returned last."""
        ...


def _no_sync() -> AbstractContextManager[Any]:
    return _NOTHING


def _nothing() -> None:
    pass


class _Attachable:
    """Eager code has nothing to attach to a device; entering and leaving a step is free."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class EagerTrainStep(_Attachable):
    """Trains on one window. Build it with ``make_train_step``.

    Args:
        spec: What to train, and how.
        precision: The numeric format.
        forward: Called with one microbatch; returns the loss. Default: ``spec.loss``.
        no_sync: Makes the context of microbatches that are not the last of their window.
        collectives: How ranks communicate; only used for weights over ranks.
        world_size: Number of ranks whose gradients ``forward`` averages.
        update: Called instead of ``precision.step``, with the same arguments.
        parts: Where gradients are looked for and measured, if this rank holds parts of them.
    """

    __slots__ = (
        "_accumulate_at_most",
        "_after_backward",
        "_autocast",
        "_backward",
        "_before_backward",
        "_before_step",
        "_before_zero_grad",
        "_clip",
        "_collectives",
        "_forward",
        "_grad_norm",
        "_gradients",
        "_no_sync",
        "_norm",
        "_optimizers",
        "_pending",
        "_prepare",
        "_update",
        "_weigh_ranks",
        "_weight",
        "_world_size",
    )

    def __init__(
        self,
        spec: StepSpec,
        precision: Precision,
        *,
        forward: Callable[[Any], Tensor] | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = _no_sync,
        collectives: Collectives | None = None,
        world_size: int = 1,
        update: Update | None = None,
        parts: GradientParts | None = None,
    ) -> None:
        check_spec(spec, precision)
        hooks = spec.hooks
        self._forward = forward or partial(spec.loss, spec.module)
        self._no_sync = no_sync
        self._autocast = precision.forward
        self._backward = precision.backward
        self._update = update or precision.step
        self._gradients = gradients if parts is None else parts.gradients
        self._pending = gradients if parts is None else parts.pending
        self._norm = total_norm if parts is None else parts.norm
        self._optimizers = tuple(spec.optimizers)
        self._before_backward = hooks.before_backward
        self._after_backward = hooks.after_backward
        self._before_step = hooks.before_optimizer_step
        self._before_zero_grad = hooks.before_zero_grad
        self._clip = spec.clip
        self._prepare = _nothing if self._before_step is None and spec.clip is None else self._ready
        self._grad_norm: Tensor | None = None
        self._accumulate_at_most = spec.accumulate
        self._weight = spec.weight
        self._weigh_ranks = (
            spec.weight is not None and spec.weight_over_ranks and collectives is not None
        ) and world_size > 1
        self._collectives = collectives
        self._world_size = world_size

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window of one to ``accumulate`` microbatches.

        Raises:
            DataError: The window is empty, too long, or does not hold as many as its length says.
            UserCodeError: The loss is not a scalar tensor that requires a gradient.
        """
        count = len(microbatches)
        try:
            loss: Tensor | None = None
            if count == 1 and not self._weigh_ranks:
                # The usual case, kept short: all that is done here is done every step.
                for microbatch in microbatches:
                    if loss is not None:
                        raise miscounted(count)
                    loss = self._differentiate(microbatch, None)
                if loss is None:
                    raise miscounted(count)
            else:
                loss = self._accumulate(microbatches, count)
            applied = self._update(self._optimizers, self._prepare)
            if self._before_zero_grad is not None:
                self._before_zero_grad(self._optimizers)
        finally:
            # Also when user code raised: gradients of half a window must not reach the next one.
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, applied, self._grad_norm)

    def release(self) -> None:
        """Let go of ``forward`` and what hangs on it. The step cannot be called any more."""
        self._forward = released
        self._no_sync = _no_sync

    def _differentiate(self, microbatch: Any, share: Tensor | float | None) -> Tensor:
        """Forward and backward of one microbatch; returns its loss, detached and undivided."""
        with self._autocast():
            loss = self._forward(microbatch)
        if type(loss) is not Tensor or loss.dim() or not loss.requires_grad:
            loss = usable_loss(loss)
        if self._before_backward is not None:
            self._before_backward(loss)
        self._backward(loss if share is None else loss * share)
        if self._after_backward is not None:
            self._after_backward()
        return loss.detach()

    def _accumulate(self, microbatches: Collection[Any], count: int) -> Tensor:
        """Gradients of the weighted mean over the window; returns that mean, detached."""
        self._check_count(count)
        if self._weight is None or (count == 1 and not self._weigh_ranks):
            return self._accumulate_alike(microbatches, count)
        return self._accumulate_weighted(microbatches, count, self._weight)

    def _accumulate_alike(self, microbatches: Collection[Any], count: int) -> Tensor:
        share = None if count == 1 else 1.0 / count
        total: Tensor | None = None
        for microbatch, last in counted(microbatches, count):
            with _NOTHING if last else self._no_sync():
                loss = self._differentiate(microbatch, share)
            if share is not None:
                loss = loss * share
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _accumulate_weighted(
        self, microbatches: Collection[Any], count: int, weight: Callable[[Any], float]
    ) -> Tensor:
        """As above, with weights that are known only as microbatches are drawn.

        Until the last one, gradients are kept relative to the first weight. When the last weight is
        known, so is the total, and what is there is brought to it before the last backward, which
        is also the one that ranks average.
        """
        reference = sum_of_weights = 0.0
        total: Tensor | None = None
        for microbatch, last in counted(microbatches, count):
            w = usable_weight(weight(microbatch))
            reference = reference or w
            sum_of_weights += w
            if last:
                unit = self._unit(sum_of_weights)
                if count > 1:
                    scale(self._pending(self._optimizers), unit * reference)
                share = unit * w
            else:
                share = w / (reference or 1.0)
            with _NOTHING if last else self._no_sync():
                loss = self._differentiate(microbatch, share)
            total = loss * w if total is None else total + loss * w
        assert total is not None
        return total / (sum_of_weights or 1.0)

    def _unit(self, sum_of_weights: float) -> Tensor | float:
        """What a weight of one is worth; on the device if other ranks have a say."""
        if not self._weigh_ranks:
            if not sum_of_weights:
                raise DataError(
                    "The weights of all microbatches of a window are zero.",
                    "Leave out microbatches that hold nothing.",
                )
            return 1.0 / sum_of_weights
        assert self._collectives is not None
        home = self._optimizers[0].param_groups[0]["params"][0].device
        mine = torch.full((), sum_of_weights, dtype=torch.float32, device=home)
        return self._world_size / self._collectives.all_reduce(mine, ReduceOp.SUM)

    def _check_count(self, count: int) -> None:
        if not 0 < count <= self._accumulate_at_most:
            raise DataError(
                f"A window of {count} microbatches was given to a step that takes 1 to "
                f"{self._accumulate_at_most}.",
                "Skip empty windows." if count == 0 else "Give at most StepSpec.accumulate.",
            )

    def _ready(self) -> None:
        """Gradients are complete and unscaled: the user's hook, then clipping."""
        if self._before_step is not None:
            self._before_step(self._optimizers)
        if self._clip is not None:
            self._grad_norm = _clip(self._gradients(self._optimizers), self._clip, self._norm)


class ClosureTrainStep(EagerTrainStep):
    """Trains with an optimizer that evaluates the loss as often as it likes, such as L-BFGS.

    Each evaluation repeats the whole window, with hooks and clipping. The result tells of the first
    one, which is the loss before the update.
    """

    __slots__ = ()

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window; see ``EagerTrainStep``."""
        count = len(microbatches)
        drawn: list[Any] = []
        first: list[tuple[Tensor, Tensor | None]] = []

        def closure() -> Tensor:
            self._clear()
            window = drawn if first else _Remembered(microbatches, count, drawn)
            with torch.enable_grad():
                loss = self._accumulate(window, count)
            self._ready()
            if self._collectives is not None and self._world_size > 1:
                # Every rank must take the same decisions, or some would wait for the others.
                loss = self._collectives.all_reduce(loss, ReduceOp.MEAN)
            if not first:
                first.append((loss, self._grad_norm))
            return loss

        try:
            applied = self._update(
                (cast("Optimizer", _WithClosure(self._optimizers[0], closure)),), _nothing
            )
            if self._before_zero_grad is not None:
                self._before_zero_grad(self._optimizers)
        finally:
            self._clear()
        if not first:
            raise UserCodeError(
                f"{type(self._optimizers[0]).__name__}.step did not call its closure.",
                "Call closure() at least once in it.",
            )
        return StepResult(first[0][0], applied, first[0][1])

    def _clear(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)


class _WithClosure:
    """An optimizer whose ``step`` brings its own closure, for a precision that calls ``step()``."""

    def __init__(self, optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
        self._optimizer = optimizer
        self._closure = closure

    def step(self) -> None:
        self._optimizer.step(cast("Callable[[], float]", self._closure))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class _Remembered:
    """A window that is drawn lazily and kept, since it will be needed again."""

    def __init__(self, microbatches: Collection[Any], count: int, kept: list[Any]) -> None:
        self._microbatches = microbatches
        self._count = count
        self._kept = kept

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item: object) -> bool:
        return item in self._kept

    def __iter__(self) -> Iterator[Any]:
        for microbatch in self._microbatches:
            self._kept.append(microbatch)
            yield microbatch


class EagerEvalStep(_Attachable):
    """The user's function without gradients, in the precision's forward context.

    Whether the module is in evaluation mode is the caller's business.
    """

    __slots__ = ("_autocast", "_function", "_no_grad")

    def __init__(self, spec: EvalSpec, precision: Precision) -> None:
        self._function = partial(spec.function, spec.module)
        self._autocast = precision.forward
        self._no_grad: Callable[[], AbstractContextManager[Any]] = (
            torch.inference_mode if spec.inference_mode else torch.no_grad
        )

    def __call__(self, *args: Any) -> Any:
        """Evaluate one batch; returns what the user's function returned."""
        with self._no_grad(), self._autocast():
            return self._function(*args)


class EagerManualStep(_Attachable):
    """For code that calls backward and the optimizers itself.

    Args:
        spec: The user's function and the optimizers that it may step.
        precision: The numeric format.
        collectives: With several ranks, how their gradients are averaged.
    """

    __slots__ = ("_autocast", "_backward", "_collectives", "_function", "_optimizers", "_update")

    def __init__(
        self, spec: ManualSpec, precision: Precision, *, collectives: Collectives | None = None
    ) -> None:
        for optimizer in spec.optimizers:
            if needs_closure(optimizer):
                raise UnsupportedError(
                    f"{type(optimizer).__name__} evaluates the loss itself, which a manual step "
                    "cannot offer it.",
                    "Use automatic optimization, or another optimizer.",
                )
        self._function = partial(spec.function, spec.module)
        self._optimizers = tuple(spec.optimizers)
        self._autocast = precision.forward
        self._backward = precision.backward
        self._update = precision.step
        self._collectives = collectives

    def __call__(self, *args: Any) -> Any:
        """Run the user's function in the precision's forward context."""
        with self._autocast():
            return self._function(*args)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate from a scalar loss, scaled if the precision needs it.

        Raises:
            UserCodeError: The loss is not a scalar tensor that requires a gradient.
        """
        if type(loss) is not Tensor or loss.dim() or not loss.requires_grad:
            loss = usable_loss(loss)
        self._backward(loss)

    def update(self, optimizer: Optimizer, clip: Clip | None = None) -> StepResult:
        """Average the gradients over ranks, unscale, clip, step. Gradients are not cleared.

        Returns:
            Whether it was applied, and the norm. Its loss is NaN: an update has none of its own.

        Raises:
            UserCodeError: The step was not built with this optimizer.
        """
        if not any(optimizer is known for known in self._optimizers):
            raise UserCodeError(
                f"A manual update of a {type(optimizer).__name__} was asked for, which is none of "
                f"the {len(self._optimizers)} optimizers of this step.",
                "Return it from configure_optimizers, so that it is saved and restored as well.",
            )
        check_clip(clip)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._collectives is not None:
            average_gradients(parameters, self._collectives)
        norm: Tensor | None = None

        def prepare() -> None:
            nonlocal norm
            if clip is not None:
                norm = _clip(gradients((optimizer,)), clip, total_norm)

        applied = self._update((optimizer,), prepare)
        home = parameters[0].device if parameters else None
        return StepResult(torch.full((), math.nan, device=home), applied, norm)


def make_train_step(
    spec: StepSpec,
    precision: Precision,
    *,
    forward: Callable[[Any], Tensor] | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] = _no_sync,
    collectives: Collectives | None = None,
    world_size: int = 1,
    update: Update | None = None,
    parts: GradientParts | None = None,
) -> EagerTrainStep:
    """The eager train step that suits the spec's optimizers; arguments as for ``EagerTrainStep``.

    Raises:
        UnsupportedError: An optimizer needs a closure and there are several, or the loss is scaled.
        ConfigurationError: The spec has no optimizer, or a number in it is out of range.
    """
    closures = [item for item in spec.optimizers if needs_closure(item)]
    kind = ClosureTrainStep if closures else EagerTrainStep
    if closures and (len(spec.optimizers) > 1 or precision.policy.loss_scaling):
        found = (
            f"precision {precision.name!r} scales it"
            if precision.policy.loss_scaling
            else f"there are {len(spec.optimizers)} optimizers"
        )
        raise UnsupportedError(
            f"{type(closures[0]).__name__} evaluates the loss itself, and {found}.",
            "Use it alone, in a precision without a loss scale.",
        )
    return kind(
        spec,
        precision,
        forward=forward,
        no_sync=no_sync,
        collectives=collectives,
        world_size=world_size,
        update=update,
        parts=parts,
    )


def _clip(
    grads: list[Tensor], clip: Clip, measure: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    if clip.by == "norm":
        return clip_by_norm(grads, clip.value, measure)
    clip_by_value(grads, clip.value)
    return None
