"""Steps on lazy tensors: the toolkit's eager steps, traced and computed by one sync per update."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch_xla
from drivetrain_interfaces import UnsupportedError, UserCodeError
from drivetrain_toolkit.checks import needs_closure
from drivetrain_toolkit.steps import EagerEvalStep, EagerManualStep, make_train_step

from drivetrain_xla.compilations import RecompilationWatch, compilations

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

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

    Step = Callable[[Collection[Any]], StepResult]

#: What torch_xla's errors about a compiled function begin with, and what they mean.
_REASONS = {
    "Unexpected execution": "something in the step needed a value before its end",
    "number of different graphs": "the step became more different graphs than max_graphs allows",
}


class XlaTrainStep:
    """Trains on one window: traced like any eager step, then handed to the device as one graph.

    What else ``make_train_step`` takes, for several ranks, is passed on to it.

    Args:
        spec: What to train, and how.
        precision: The numeric format.
        max_graphs: Hand over the step as one graph that nothing interrupts, and of which there are
            at most so many; 0 allows both.

    Attributes:
        watch: What was compiled, and for which shapes.
    """

    __slots__ = ("_drawn", "_loss", "_run", "watch")

    def __init__(
        self, spec: StepSpec, precision: Precision, *, max_graphs: int = 0, **ranks: Any
    ) -> None:
        self._loss = partial(spec.loss, spec.module)
        inner = make_train_step(spec, precision, forward=self._forward, **ranks)
        self._run = (
            _as_one_graph(inner, spec, precision, max_graphs) if max_graphs else _then_sync(inner)
        )
        self._drawn: list[Any] = []
        self.watch = RecompilationWatch()

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window; errors are those of ``EagerTrainStep``."""
        before = compilations()
        try:
            result = self._run(microbatches)
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


def _then_sync(inner: Step) -> Step:
    def run(microbatches: Collection[Any]) -> StepResult:
        result = inner(microbatches)
        torch_xla.sync()
        return result

    return run


def _as_one_graph(inner: Step, spec: StepSpec, precision: Precision, max_graphs: int) -> Step:
    """The step under ``torch_xla.compile``, which syncs before and after it."""
    if precision.policy.loss_scaling or any(needs_closure(each) for each in spec.optimizers):
        raise UnsupportedError(
            f"compile_step=True was asked for with precision {precision.name!r} and "
            f"{type(spec.optimizers[0]).__name__}, of which one reads values back inside a step.",
            "Use a precision without a loss scale and an optimizer without a closure.",
        )

    def step(microbatches: Collection[Any]) -> StepResult:
        return inner(microbatches)

    compiled = torch_xla.compile(step, full_graph=True, max_different_graphs=max_graphs)

    def run(microbatches: Collection[Any]) -> StepResult:
        try:
            result: StepResult = compiled(microbatches)
        except RuntimeError as error:
            why = next((text for sign, text in _REASONS.items() if sign in str(error)), None)
            if why is None:
                raise
            raise UserCodeError(
                f"compile_step=True was asked for, and {why}.",
                "Remove item(), print() and branches on values from the step, pad batches to one "
                "shape, or leave compile_step out.",
            ) from error
        return result

    return run


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
        """As ``EagerManualStep.update``, computed at once; gradients first where ranks meet."""
        if self._collectives is not None:
            torch_xla.sync()
        result = super().update(optimizer, clip)
        torch_xla.sync()
        return result
