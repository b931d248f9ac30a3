"""Stopping when a metric no longer improves."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks.base import Callback, Moment
from drivetrain.callbacks.monitor import Monitor

if TYPE_CHECKING:
    from drivetrain.module import Module
    from drivetrain.trainer import Trainer

_log = logging.getLogger("drivetrain")
_STEP = Moment.STEP  # looked up once: it is compared after every window


class EarlyStopping(Callback):
    """Stops the fit when a metric has not improved for a number of checks.

    Every check uses rank 0's value, so that all ranks stop at the same point. A value counts once:
    an epoch without validation says nothing about a validation metric.

    Args:
        monitor: The metric.
        min_delta: The smallest change that counts as an improvement.
        patience: How many checks without improvement are one too many.
        mode: ``"min"`` if a smaller value is better, ``"max"`` if a larger is.
        strict: Whether a metric that nobody logs is an error; if not, it is a warning.
        check_finite: Stop when the metric becomes NaN or infinite.
        stopping_threshold: Stop once the metric is better than this.
        divergence_threshold: Stop once the metric is worse than this.
        check_on_train_epoch_end: Check at the end of an epoch (True), after each validation
            (False), or where the metric comes from (None).

    Attributes:
        wait_count: Checks without improvement since the last improvement.
        stopped_epoch: The epoch in which it stopped, from 0; -1 before that.
        best_score: The best value so far.
        reason: Why it stopped; empty before that.

    Raises:
        ConfigurationError: ``mode``, ``patience`` or ``min_delta`` means nothing.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        *,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
    ) -> None:
        if patience < 0 or min_delta < 0:
            raise ConfigurationError(
                f"{type(self).__name__} was given patience={patience} and min_delta={min_delta}.",
                "Use values of 0 or more.",
            )
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self._watch = Monitor(monitor, mode, type(self).__name__)
        self._reset()

    def _reset(self) -> None:
        """A fit begins: nothing was checked."""
        self._watch.reset()
        self.wait_count = 0
        self.stopped_epoch = -1
        self.best_score = math.inf if self.mode == "min" else -math.inf
        self.reason = ""
        self._checked_validations = 0
        self._warned = False
        self._epoch = 0

    @property
    def state_key(self) -> str:
        """Tells several callbacks of one run apart."""
        return f"{type(self).__qualname__}[{self.monitor!r}, {self.mode!r}]"

    # Hooks
    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """A fit that resumes no other starts with an empty memory."""
        if stage == "fit":
            self._reset()

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Learn where the metric comes from."""
        self._watch.validation_starts(trainer)

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """An epoch that is resumed does not start again."""
        self._epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Remember the epoch, whatever the counter does at its end."""
        self._epoch = trainer.current_epoch

    def on_save_opportunity(self, trainer: Trainer, module: Module, moment: Moment) -> None:
        """Check, if the metric is checked now. All hooks that log have run, on every rank.

        Raises:
            ConfigurationError: Nobody logs the metric, and ``strict`` is set.
        """
        if moment is _STEP:
            return
        asked = self.check_on_train_epoch_end
        if moment is Moment.VALIDATION:
            self._watch.validation_ends(trainer)
            if asked is False or (asked is None and self._watch.from_validation):
                self._check(trainer)
        elif moment is Moment.EPOCH and (
            asked is True or (asked is None and not self._watch.from_validation)
        ):
            self._check(trainer)

    # The decision
    def _check(self, trainer: Trainer) -> None:
        watch = self._watch
        if watch.from_validation and self._checked_validations == watch.validations:
            return
        self._checked_validations = watch.validations
        value = trainer.collectives.broadcast_object(watch.value(trainer))
        if value is None:
            self._without_value(trainer)
            return
        reason = self.judge(value)
        if reason:
            self.reason = reason
            self.stopped_epoch = self._epoch
            trainer.should_stop = True
            if trainer.is_global_zero:
                _log.warning("Stopping: %s", reason)

    def _without_value(self, trainer: Trainer) -> None:
        if self._watch.may_still_come(trainer):
            return
        if self.strict:
            raise self._watch.missing(list(trainer.callback_metrics))
        if not self._warned and trainer.is_global_zero:
            self._warned = True
            _log.warning("%s", self._watch.missing(list(trainer.callback_metrics)))

    def judge(self, value: float) -> str:
        """Take one value into account; returns why to stop, or an empty string."""
        name, better = self.monitor, self._watch.better
        if self.check_finite and not math.isfinite(value):
            return f"{name} is {value}, which is not finite; the best was {self.best_score:.6g}."
        if self.stopping_threshold is not None and better(value, self.stopping_threshold):
            return f"{name} has reached {value:.6g}, beyond {self.stopping_threshold}."
        if self.divergence_threshold is not None and better(self.divergence_threshold, value):
            return f"{name} has diverged to {value:.6g}, beyond {self.divergence_threshold}."
        needed = self.best_score + (-self.min_delta if self.mode == "min" else self.min_delta)
        if better(value, needed):
            self.best_score = value
            self.wait_count = 0
            return ""
        self.wait_count += 1
        if self.wait_count < self.patience:
            return ""
        return (
            f"{name} has not improved by more than {self.min_delta} in the last "
            f"{self.wait_count} checks; the best was {self.best_score:.6g}."
        )

    # State
    def state_dict(self) -> dict[str, Any]:
        """The decision's memory."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "reason": self.reason,
            "checked_validations": self._checked_validations,
            "monitor": self._watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved run was."""
        self.wait_count = state["wait_count"]
        self.stopped_epoch = state["stopped_epoch"]
        self.best_score = state["best_score"]
        self.reason = state["reason"]
        self._checked_validations = state["checked_validations"]
        self._watch.load_state_dict(state["monitor"])
