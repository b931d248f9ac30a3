"""Manual optimization: the user's code calls backward and the optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import Clip

if TYPE_CHECKING:
    import torch
    from drivetrain_interfaces import ManualStep

    from drivetrain.counters import Progress


class ManualOptimizer:
    """An optimizer as ``Module.optimizers`` returns it; other attributes are the optimizer's own.

    Attributes:
        optimizer: The wrapped optimizer.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, step: ManualStep, progress: Progress
    ) -> None:
        self.optimizer = optimizer
        self._step = step
        self._progress = progress

    def step(self, *, max_norm: float | None = None, max_value: float | None = None) -> bool:
        """Average gradients over ranks, unscale, clip if asked, and update.

        Returns:
            Whether the update was applied; False if gradients were not finite under a loss scale.
        """
        clip = Clip(max_norm, "norm") if max_norm is not None else None
        if max_value is not None:
            clip = Clip(max_value, "value")
        result = self._step.update(self.optimizer, clip)
        applied = result is None or result.applied
        if applied:
            self._progress.global_step += 1
        else:
            self._progress.skipped += 1
        return applied

    def zero_grad(self) -> None:
        """Clear the gradients of this optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)
