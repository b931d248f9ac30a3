"""The train step: the engine's forward, backward and update, one call for each window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import DataError, ReduceOp, StepResult
from drivetrain_toolkit.checks import counted, released, usable_weight
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from drivetrain_interfaces import Collectives, StepSpec
    from typing_extensions import Self


class EngineStep:
    """Trains on one window. The engine reduces, clips, updates and clears.

    Args:
        engine: Made with ``managed_gradient_accumulation=False``: its ``step`` ends a window.
        spec: What to train, and how.
        discard: Called when user code raised, to drop the gradients of half a window.
        collectives: How ranks communicate; only used for weights over ranks.
        world_size: Number of ranks.
        device: Where weights are summed.
    """

    __slots__ = (
        "_accumulate_at_most",
        "_after_backward",
        "_backward",
        "_before_backward",
        "_clipped",
        "_collectives",
        "_device",
        "_discard",
        "_engine",
        "_forward",
        "_weigh_ranks",
        "_weight",
        "_world_size",
    )

    def __init__(
        self,
        engine: Any,
        spec: StepSpec,
        discard: Callable[[], None],
        *,
        collectives: Collectives,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._engine = engine
        self._forward: Callable[[Any], Tensor] = engine
        self._backward = engine.backward
        self._before_backward = spec.hooks.before_backward
        self._after_backward = spec.hooks.after_backward
        self._clipped = spec.clip is not None
        self._accumulate_at_most = spec.accumulate
        self._weight = spec.weight
        self._weigh_ranks = spec.weight is not None and spec.weight_over_ranks and world_size > 1
        self._discard = discard
        self._collectives = collectives
        self._world_size = world_size
        self._device = device

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window of one to ``accumulate`` microbatches.

        With weights the window is drawn whole before the first backward: the engine may reduce
        after each one, and what a microbatch counts for must be known by then.

        Raises:
            DataError: The window is empty, too long, or does not hold as many as its length says.
            UserCodeError: The loss is not a scalar tensor that requires a gradient.
        """
        count = len(microbatches)
        if not 0 < count <= self._accumulate_at_most:
            raise DataError(
                f"A window of {count} microbatches was given to a step that takes 1 to "
                f"{self._accumulate_at_most}.",
                "Skip empty windows." if count == 0 else "Give at most StepSpec.accumulate.",
            )
        try:
            if self._weight is None or (count == 1 and not self._weigh_ranks):
                loss = self._alike(microbatches, count)
            else:
                loss = self._weighted(microbatches, count, self._weight)
        except BaseException:
            self._discard()
            raise
        engine = self._engine
        engine.step()
        norm = engine.get_global_grad_norm() if self._clipped else None
        if norm is not None and not isinstance(norm, Tensor):
            norm = torch.full((), norm, device=self._device)
        return StepResult(loss, engine.was_step_applied(), norm)

    def release(self) -> None:
        """Let go of the engine. The step cannot be called any more."""
        self._forward = released
        self._backward = self._engine = None
        self._discard = _nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _differentiate(self, microbatch: Any, share: Tensor | float | None) -> Tensor:
        """Forward and backward of one microbatch; returns its loss, detached and undivided."""
        loss = self._forward(microbatch)
        if self._before_backward is not None:
            self._before_backward(loss)
        # Not the output itself: at stage 0 a hook on it would divide by the most of a window.
        scaled = loss.view_as(loss) if share is None else loss * share
        self._backward(scaled, scale_wrt_gas=False)
        if self._after_backward is not None:
            self._after_backward()
        return loss.detach()

    def _alike(self, microbatches: Collection[Any], count: int) -> Tensor:
        share = None if count == 1 else 1.0 / count
        total: Tensor | None = None
        for microbatch, _ in counted(microbatches, count):
            loss = self._differentiate(microbatch, share)
            if share is not None:
                loss = loss * share
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _weighted(
        self, microbatches: Collection[Any], count: int, weight: Callable[[Any], float]
    ) -> Tensor:
        window = [microbatch for microbatch, _ in counted(microbatches, count)]
        weights = [usable_weight(weight(microbatch)) for microbatch in window]
        mine = sum(weights)
        unit: Tensor | float
        if self._weigh_ranks:
            whole = torch.full((), mine, dtype=torch.float32, device=self._device)
            unit = self._world_size / self._collectives.all_reduce(whole, ReduceOp.SUM)
        elif mine:
            unit = 1.0 / mine
        else:
            raise DataError(
                "The weights of all microbatches of a window are zero.",
                "Leave out microbatches that hold nothing.",
            )
        total: Tensor | None = None
        for microbatch, w in zip(window, weights, strict=True):
            loss = self._differentiate(microbatch, unit * w) * w
            total = loss if total is None else total + loss
        assert total is not None
        return total / (mine or 1.0)


def _nothing() -> None:
    pass
