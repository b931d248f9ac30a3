"""The train step of a pipeline: forward and backward of parts of a batch, on a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from drivetrain_interfaces import DataError, UserCodeError
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from drivetrain_toolkit.rows import count_rows, shapes_of, some_rows
from drivetrain_toolkit.shards import Shards
from drivetrain_toolkit.steps import EagerTrainStep
from drivetrain_toolkit.strategies.stages import REHEARSES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from drivetrain_interfaces import Precision, StepResult, StepSpec
    from torch.optim import Optimizer

    from drivetrain_toolkit.strategies.pipeline import PipelineStrategy
    from drivetrain_toolkit.strategies.stages import Line

SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}

#: Schedules that a step keeps, by the shapes of batches; each has buffers of its own.
_MOST_PLANS = 8


class _Entered(BaseException):  # no error: it ends the loss function where the sequence begins
    """Carries what the sequence was called with."""

    def __init__(self, value: Any) -> None:
        self.value = value


class PipelineStep(EagerTrainStep):
    """A train step whose forward and backward are one, on a schedule."""

    __slots__ = (
        "_device",
        "_kind",
        "_line",
        "_losses",
        "_owner",
        "_parts",
        "_plans",
        "_rehearsal",
        "_sending",
        "_share",
        "_spec",
        "_whole",
    )

    def __init__(self, spec: StepSpec, precision: Precision, owner: PipelineStrategy) -> None:
        line, held = owner.line()
        super().__init__(
            spec,
            precision,
            collectives=owner.context.collectives if line.copies > 1 else None,
            world_size=owner.context.world.size,
            update=None if line.copies == 1 else _Averaged(precision, line, held),
            parts=Shards(everywhere=[line.group], device=owner.device),
        )
        self._line = line
        self._spec = spec
        self._owner: PipelineStrategy | None = owner
        self._device = owner.device
        # What a loss travels in: ranks that do not compute it cannot know its format.
        kinds = {p.dtype for p in spec.module.parameters()}
        self._kind = torch.float64 if torch.float64 in kinds else torch.float32
        self._plans: dict[Any, tuple[int, Any]] = {}
        self._whole: Any = None
        self._share: Tensor | float | None = None
        self._losses: list[Tensor] = []
        self._parts = 1
        self._rehearsal = False
        self._sending: Any = None  # the loss, on its way to the other ranks

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window; see ``EagerTrainStep``.

        Ranks finish backward one after the other, and wait for each other's loss only after the
        update.
        """
        result = super().__call__(microbatches)
        self._arrived()
        return result

    def release(self) -> None:
        """Let go of the stages. The step cannot be called any more."""
        super().release()
        self._owner = None
        self._plans.clear()

    def _differentiate(self, microbatch: Any, share: Tensor | float | None) -> Tensor:
        if self._owner is None:
            return self._forward(microbatch)  # says that it was released
        rows = count_rows(microbatch, self._owner.name)
        schedule = self._schedule(microbatch, rows)
        line = self._line
        self._whole, self._share, self._losses = microbatch, share, []
        last = line.stages - 1
        with self._autocast():
            arguments = (self._input(microbatch),) if line.stage == 0 else ()
            target = {"target": torch.arange(rows)} if line.stage == last else {}
            schedule.step(*arguments, **target)
        if self._after_backward is not None:
            self._after_backward()
        loss = torch.zeros((), dtype=self._kind, device=self._device)
        if self._losses:
            loss += torch.stack(self._losses).sum()
        self._sending = dist.broadcast(loss, group=line.group, group_src=last, async_op=True)
        if share is not None:
            self._arrived()  # the caller computes with it
        return loss

    def _arrived(self) -> None:
        """Wait for the last loss that was sent, so that others can read it."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.wait()

    def _schedule(self, microbatch: Any, rows: int) -> Any:
        """The schedule for batches of these shapes, which are the same on every rank."""
        shapes = shapes_of(microbatch)
        if shapes not in self._plans:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            self._plans[shapes] = self._planned(microbatch, rows)
        self._parts, schedule = self._plans[shapes]
        return schedule

    def _planned(self, microbatch: Any, rows: int) -> tuple[int, Any]:
        owner = self._owner
        assert owner is not None
        options = owner.options
        parts = next(n for n in range(min(options.microbatches, rows), 0, -1) if rows % n == 0)
        stages = owner.made_stages(lambda: self._input(microbatch)[: rows // parts])
        kind = SCHEDULES[options.schedule]
        held: Any = stages if options.schedule == "interleaved" else stages[0]
        self._rehearsal = REHEARSES and options.example is None
        try:
            return parts, kind(held, parts, loss_fn=self._part_loss, scale_grads=False)
        except ValueError as error:
            raise DataError(
                f"A batch of {rows} rows was given to the strategy {owner.name!r} on "
                f"{self._line.stages} processes, which makes {parts} microbatches of it; "
                f"{options.schedule!r} wants more.",
                "Use larger batches, other microbatches, or schedule='gpipe'.",
            ) from error

    def _input(self, microbatch: Any) -> Tensor:
        """What the user's loss function gives to the sequence."""
        try:
            with torch.no_grad():
                self._through(microbatch, _enter)
        except _Entered as entered:
            if isinstance(entered.value, Tensor):
                return entered.value
            raise UserCodeError(
                f"The loss function called the sequence with a {type(entered.value).__name__}.",
                "Call it with one tensor whose rows are the samples.",
            ) from None
        raise UserCodeError(
            "The loss function did not call the sequence that the strategy 'pipeline' divides.",
            "Call it once, with one tensor whose rows are the samples.",
        )

    def _part_loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """The loss of one part, for its share of the whole."""
        if self._rehearsal:  # the user's function would be given values that no layer computed
            self._rehearsal = False
            return output.square().sum()
        first, count = int(rows[0]), rows.shape[0]
        part = some_rows(self._whole, first, first + count)
        loss = self._through(part, lambda _: output) / self._parts
        self._losses.append(loss.detach())
        return loss if self._share is None else loss * self._share

    def _through(self, microbatch: Any, instead: Any) -> Tensor:
        """The user's loss, with something in the place of the sequence."""
        assert self._owner is not None
        sequence = self._owner.divided
        sequence.forward = instead
        try:
            return self._spec.loss(self._spec.module, microbatch)
        finally:
            del sequence.forward


class _Averaged:
    """An update of gradients that copies average first."""

    def __init__(self, precision: Precision, line: Line, held: frozenset[int]) -> None:
        self._precision = precision
        self._line = line
        self._held = held

    def __call__(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        self._line.average(
            [
                p
                for optimizer in optimizers
                for group in optimizer.param_groups
                for p in group["params"]
                if p.requires_grad and id(p) in self._held
            ]
        )
        return self._precision.step(optimizers, prepare)


def _enter(value: Any, *_: Any) -> Any:
    raise _Entered(value)
