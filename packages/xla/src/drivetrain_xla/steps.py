"""Steps on lazy tensors: the toolkit's eager steps, traced and computed by one sync per update."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch_xla
from drivetrain_toolkit.steps import EagerEvalStep, EagerManualStep, make_train_step

from drivetrain_xla.compilations import RecompilationWatch, compilations

if TYPE_CHECKING:
    from collections.abc import Collection

    from drivetrain_interfaces import (
        Clip,
        Collectives,
        ManualSpec,
        Precision,
        StepResult,
        StepSpec,
    )
    from torch import Tensor
    from torch.optim import Optimizer
    from typing_extensions import Self


class XlaTrainStep:
    """Trains on one window: traced like any eager step, then handed to the device as one graph.

    Args:
        spec: What to train, and how.
        precision: The numeric format.

    Attributes:
        watch: What was compiled, and for which shapes.
    """

    __slots__ = ("_drawn", "_inner", "_loss", "watch")

    def __init__(self, spec: StepSpec, precision: Precision) -> None:
        self._loss = partial(spec.loss, spec.module)
        self._inner = make_train_step(spec, precision, forward=self._forward)
        self._drawn: list[Any] = []
        self.watch = RecompilationWatch()

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window; errors are those of ``EagerTrainStep``."""
        before = compilations()
        try:
            result = self._inner(microbatches)
            torch_xla.sync()
            self.watch.note(compilations() - before, self._drawn)
        finally:
            self._drawn.clear()
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _forward(self, microbatch: Any) -> Tensor:
        self._drawn.append(microbatch)
        return self._loss(microbatch)


class XlaEvalStep(EagerEvalStep):
    """The user's function without gradients; what it computes is one graph."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        """Evaluate one batch; returns what the user's function returned."""
        result = super().__call__(*args)
        torch_xla.sync()
        return result


class XlaManualStep(EagerManualStep):
    """For code that calls backward and the optimizers itself: each update is one graph.

    Args:
        spec: The user's function and the optimizers that it may step.
        precision: The numeric format.
        collectives: With several ranks, how their gradients are averaged.
    """

    __slots__ = ()

    def __init__(
        self, spec: ManualSpec, precision: Precision, *, collectives: Collectives | None = None
    ) -> None:
        super().__init__(spec, precision, collectives=collectives)

    def update(self, optimizer: Optimizer, clip: Clip | None = None) -> StepResult:
        """As ``EagerManualStep.update``, computed at once."""
        result = super().update(optimizer, clip)
        torch_xla.sync()
        return result
