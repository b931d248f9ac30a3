"""One window of batches: from the loader's batches to one call of the strategy's step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from drivetrain_interfaces import UserCodeError

from drivetrain.hooks import trimmed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drivetrain_interfaces import ManualStep, StepResult, TrainStep
    from torch import nn

    from drivetrain.metrics import Metrics
    from drivetrain.module import Module


@runtime_checkable
class RunsUserCodeOnce(Protocol):
    """A train step that runs the user's loss while it is traced, for the first batch, and no more.

    Python values that the code saw or kept then are those of no batch.
    """

    @property
    def runs_user_code_once(self) -> bool:
        """Whether it does."""
        ...


class AutomaticWindow:
    """Forward, backward and update by the strategy; the user's code only computes the loss.

    Args:
        module: The user's module, as the strategy has prepared it.
        feed: Moves a batch to the device.
        metrics: Where ``log`` goes, which wants to know the batch in hand.
        keep: Whether anybody wants the outputs.
    """

    def __init__(
        self, module: Module, feed: Callable[[Any], Any], metrics: Metrics, *, keep: bool
    ) -> None:
        self._traced = False
        self.index = 0
        self.feed = feed
        self.metrics = metrics
        self._owner = type(module).__name__
        self._training_step = trimmed(module.training_step, 2)
        self._keep = keep
        self._count = 1
        self._outputs: list[Any] = []

    @property
    def step(self) -> TrainStep:
        """The strategy's step, which calls ``loss``."""
        return self._step

    @step.setter
    def step(self, step: TrainStep) -> None:
        self._step = step
        self._traced = isinstance(step, RunsUserCodeOnce) and step.runs_user_code_once

    def loss(self, _module: nn.Module, batch: Any) -> torch.Tensor:
        """The user's loss of one microbatch; called by the strategy."""
        index = UNKNOWN_INDEX if self._traced else self.index
        output = self._training_step(batch, index)
        if output.__class__ is torch.Tensor and not self._keep:
            return output
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, torch.Tensor):
            raise UserCodeError(
                f"{self._owner}.training_step returned {_described(output)}.",
                "Return the loss as a scalar tensor, or a dictionary with it under 'loss'.",
            )
        if self._keep:
            extra = dict(output) if isinstance(output, Mapping) else {}
            self._outputs.append({**extra, "loss": loss.detach()})
        return loss

    def __call__(self, window: list[Any], first: int) -> StepResult:
        """Train on the window whose first batch has the index ``first``."""
        if self._keep:
            self._outputs.clear()
            self._count = len(window)
        if len(window) == 1:
            batch = window[0]
            self.index = first
            self.metrics.batch = batch
            return self._step((self.feed(batch),))
        return self._step(_Microbatches(window, first, self))

    def outputs(self, result: StepResult | None) -> list[Any]:
        """What the user's step returned for each batch of the last window."""
        # An optimizer with a closure evaluates several times; the last evaluation counts. A
        # compiled step may run the user's code only once, and then only the loss is known.
        if self._traced or len(self._outputs) < self._count:
            return [{"loss": result.loss if result else None}] * self._count
        return self._outputs[-self._count :]


class _UnknownIndex:
    """The number of a batch, where user code is run for one batch and used for all."""


def _refuse_index(*_: Any) -> Any:
    raise UserCodeError(
        "training_step reads its batch_idx, and the strategy runs it once, for all batches.",
        "Leave batch_idx alone there; hooks such as on_train_batch_end get it.",
    )


for _name in (
    *("index", "int", "float", "bool", "hash", "str", "repr", "format"),
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "add", "sub", "mul", "truediv", "floordiv"),
    *("mod", "pow", "radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow"),
):
    setattr(_UnknownIndex, f"__{_name}__", _refuse_index)
UNKNOWN_INDEX = _UnknownIndex()


class _Microbatches(Collection[Any]):
    """A window whose batches reach the device one at a time, when the step draws them."""

    def __init__(self, window: list[Any], first: int, owner: AutomaticWindow) -> None:
        self._window = window
        self._first = first
        self._owner = owner

    def __len__(self) -> int:
        return len(self._window)

    def __contains__(self, item: object) -> bool:
        return any(item is batch for batch in self._window)

    def __iter__(self) -> Iterator[Any]:
        owner = self._owner
        for offset, batch in enumerate(self._window):
            owner.index = self._first + offset
            owner.metrics.batch = batch
            yield owner.feed(batch)


class ManualWindow:
    """The user's code does it all; arguments as for ``AutomaticWindow``."""

    def __init__(self, feed: Callable[[Any], Any], metrics: Metrics) -> None:
        self.step: ManualStep
        self._feed = feed
        self._metrics = metrics
        self._outputs: list[Any] = []

    def __call__(self, window: list[Any], first: int) -> None:
        """Run the user's step on each batch."""
        self._outputs = []
        for offset, batch in enumerate(window):
            self._metrics.batch = batch
            self._outputs.append(self.step(self._feed(batch), first + offset))

    def outputs(self, _result: StepResult | None) -> list[Any]:
        """What the user's step returned for each batch of the last window."""
        return self._outputs


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dictionary with the keys {sorted(map(str, output))} and no tensor under 'loss'"
    return "None" if output is None else f"a {type(output).__name__}"
