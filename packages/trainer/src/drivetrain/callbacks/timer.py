"""A time budget for training."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks.base import Callback, Moment
from drivetrain.durations import seconds_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from drivetrain.module import Module
    from drivetrain.trainer import Trainer

_log = logging.getLogger("drivetrain")
_INTERVALS = ("epoch", "step")
_STEP = Moment.STEP  # looked up once: it is compared after every window


class Timer(Callback):
    """Stops the fit when training has taken its time, validation and earlier processes included.

    Rank 0's clock decides for all ranks. It is asked at steps that are multiples of
    ``log_every_n_steps``, and at the end of every epoch, so that no step waits for a message.

    Args:
        duration: The budget: a ``timedelta``, its arguments as a mapping, or ``"DD:HH:MM:SS"``.
            None measures without a limit.
        interval: ``"step"``, or ``"epoch"`` to finish the epoch first.

    Attributes:
        duration: The budget in seconds; infinite without a limit.

    Raises:
        ConfigurationError: ``duration`` or ``interval`` means nothing.
    """

    def __init__(
        self,
        duration: timedelta | Mapping[str, float] | str | None = None,
        interval: str = "step",
    ) -> None:
        if interval not in _INTERVALS:
            raise ConfigurationError(
                f"{type(self).__name__} was given interval={interval!r}.", "Use 'step' or 'epoch'."
            )
        self.duration = math.inf if duration is None else seconds_of(duration)
        self.interval = interval
        self._finishes_epochs = interval == "epoch" or math.isinf(self.duration)
        self._before = 0.0
        self._start: float | None = None
        self._asked = -1
        self._over = False

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Every fit has the whole budget, unless it resumes another."""
        if stage == "fit":
            self._before = 0.0
            self._over = False

    def time_elapsed(self) -> float:
        """Seconds of training so far, those of the runs that this one resumes included."""
        running = 0.0 if self._start is None else time.monotonic() - self._start
        return self._before + running

    def time_remaining(self) -> float:
        """Seconds that are left; infinite without a limit, never negative."""
        return max(self.duration - self.time_elapsed(), 0.0)

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Start the clock; a budget that earlier runs have spent ends this one at once."""
        self._start = time.monotonic()
        self._asked = -1
        self._check(trainer)

    def on_save_opportunity(self, trainer: Trainer, module: Module, moment: Moment) -> None:
        """Ask the clock, at a log point or the end of an epoch. Every rank is here."""
        if moment is _STEP:
            step = trainer.global_step
            if self._finishes_epochs or step % trainer.log_every_n_steps or step == self._asked:
                return
            self._asked = step
            self._check(trainer)
        elif moment is Moment.EPOCH:
            self._check(trainer)

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Stop the clock."""
        self._stop()

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Stop the clock, also after an error."""
        self._stop()

    def _stop(self) -> None:
        self._before = self.time_elapsed()
        self._start = None

    def _check(self, trainer: Trainer) -> None:
        if math.isinf(self.duration) or self._over:
            return
        if trainer.collectives.broadcast_object(self.time_remaining() <= 0):
            self._over = True
            trainer.should_stop = True
            if trainer.is_global_zero:
                _log.warning(
                    "Stopping: training has taken %.1f s of the %.1f s allowed.",
                    self.time_elapsed(),
                    self.duration,
                )

    def state_dict(self) -> dict[str, Any]:
        """The time that was spent."""
        return {"elapsed": self.time_elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count the time that the saved run had spent."""
        self._before = float(state["elapsed"])
