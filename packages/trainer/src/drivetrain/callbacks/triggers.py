"""When a checkpoint is due: a pure function of counters, so that every rank agrees."""

from __future__ import annotations

from dataclasses import dataclass

from drivetrain.callbacks.base import Moment


@dataclass(frozen=True, slots=True)
class When:
    """The triggers of one checkpoint callback. Several may be set; each fires on its own.

    Attributes:
        steps: After every so many applied optimizer steps; 0 for never.
        epochs: Every so many epochs; 0 for never.
        seconds: After so many seconds of training since the last save; 0 for never.
        at_epoch_end: Whether ``epochs`` means the end of the epoch (True), its validations
            (False), or its validations if it has any and else its end (None).
        at_interrupt: Whether a stop by a signal saves.
        at_end: Whether the end of the fit saves what no other trigger has saved.
    """

    steps: int = 0
    epochs: int = 0
    seconds: float = 0.0
    at_epoch_end: bool | None = None
    at_interrupt: bool = True
    at_end: bool = False

    def watches_steps(self) -> bool:
        """Whether anything can become due between two epochs."""
        return self.steps > 0 or self.seconds > 0

    def due_at_step(self, step: int) -> bool:
        """Whether a checkpoint is due after a window, leaving the clock aside."""
        return self.steps > 0 and step > 0 and step % self.steps == 0

    def due(self, moment: Moment, step: int, epoch: int, *, validated: bool) -> bool:
        """Whether a checkpoint is due at a moment, leaving the clock aside.

        Args:
            moment: The moment.
            step: Applied optimizer steps.
            epoch: The epoch, from 0.
            validated: Whether a validation has ended in this epoch.
        """
        if moment is Moment.STEP:
            return self.due_at_step(step)
        if moment is Moment.INTERRUPTED:
            return self.at_interrupt
        if moment is Moment.END:
            return self.at_end
        if not self.epochs or (epoch + 1) % self.epochs:
            return False
        if moment is Moment.VALIDATION:
            return self.at_epoch_end is not True
        return self.at_epoch_end is True or (self.at_epoch_end is None and not validated)
