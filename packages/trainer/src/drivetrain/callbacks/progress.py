"""Showing how far a run has come."""

from __future__ import annotations

import math
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO

from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks.base import Callback, Moment
from drivetrain.callbacks.display import Lines, View, make_display

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain.callbacks.display import Display
    from drivetrain.module import Module
    from drivetrain.trainer import Trainer

_NEVER = math.inf
_SMOOTHING = 0.3
_STEP = Moment.STEP


class Pace:
    """Batches of one phase, and how fast they go by.

    Args:
        title: What the phase is called.
        total: Batches in all.
        first: Batches that were done before, as when an epoch is resumed.
    """

    def __init__(self, title: str, total: float, first: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = first
        self._first = first
        self._began = self._marked = monotonic()
        self._marked_done = first
        self._paused = 0.0
        self._rate = 0.0

    def reach(self, done: int, now: float) -> None:
        """Note how many are done; the rate is smoothed over the notes."""
        new, seconds = done - self._marked_done, now - self._marked
        if new > 0 and seconds > 0:
            rate = new / seconds
            self._rate += (rate - self._rate) * (_SMOOTHING if self._rate else 1.0)
        self.done, self._marked_done, self._marked = done, done, now

    def skip(self, seconds: float, now: float) -> None:
        """Do not count the time that something else took, such as a validation."""
        self._paused += seconds
        self._marked = now

    def now(self, metrics: dict[str, Any]) -> View:
        """The present state, with the present rate."""
        return View(self.title, self.done, self.total, self._rate, 0.0, metrics)

    def whole(self, done: int, metrics: dict[str, Any]) -> View:
        """The state at the end, with the mean rate."""
        seconds = max(monotonic() - self._began - self._paused, 1e-9)
        rate = max(done - self._first, 0) / seconds
        return View(self.title, done, self.total, rate, seconds, metrics)


class ProgressBar(Callback):
    """Shows progress on rank 0, on standard error.

    On a terminal a line is redrawn in place; elsewhere, as in a log file, a plain line is written
    now and then. Either way there is one line that stays per epoch and per validation. A batch
    costs one look at the clock. Values are those of ``trainer.progress_bar_metrics``, which change
    at log points; no tensor is read for the sake of the bar.

    Args:
        refresh_per_second: How often the line on a terminal is redrawn at most.
        seconds_between_lines: How long it takes at least from one plain line to the next.
        plain: Whether to write plain lines; None looks at the stream.
        stream: Where to write; standard error by default.

    Raises:
        ConfigurationError: An interval is not positive.
    """

    def __init__(
        self,
        refresh_per_second: float = 10.0,
        seconds_between_lines: float = 5.0,
        *,
        plain: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        if not (refresh_per_second > 0 and seconds_between_lines > 0):
            raise ConfigurationError(
                f"{type(self).__name__} was given refresh_per_second={refresh_per_second} and "
                f"seconds_between_lines={seconds_between_lines}.",
                "Use positive numbers.",
            )
        self._between = 1 / refresh_per_second, seconds_between_lines
        self._plain = plain
        self._stream = stream
        self._display: Display | None = None
        self._interval = _NEVER
        self._due = _NEVER
        self._training: Pace | None = None
        self._evaluating: Pace | None = None
        self._evaluation_began = 0.0
        self._evaluated = 0

    # The whole run
    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Look at the stream, on rank 0."""
        self._due = _NEVER
        self._training = self._evaluating = None
        if trainer.is_global_zero:
            self._display = make_display(self._stream or sys.stderr, plain=self._plain)
            self._interval = self._between[isinstance(self._display, Lines)]

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_exception(self, trainer: Trainer, module: Module, error: BaseException) -> None:
        """Leave the terminal as it was, so that the error can be read."""
        self._close()

    def _close(self) -> None:
        self._due = _NEVER
        if self._display is not None:
            self._display.close()
            self._display = None

    # Training
    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """An epoch that is resumed does not start again."""
        self._open_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Begin at zero."""
        self._open_epoch(trainer)

    def _open_epoch(self, trainer: Trainer) -> None:
        if self._display is None:
            return
        title = f"epoch {trainer.current_epoch + 1}"
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            title += f"/{trainer.max_epochs}"
        self._training = Pace(title, trainer.num_training_batches, trainer.batch_idx)
        self._wait()

    def on_save_opportunity(self, trainer: Trainer, module: Module, moment: Moment) -> None:
        """Redraw if it is time; by far the most calls end at the first line.

        Once per window, and unlike ``on_train_batch_end`` it does not make the trainer keep the
        outputs of every step.
        """
        if monotonic() < self._due:
            return
        if moment is _STEP and self._training is not None:
            self._draw(self._training, trainer.batch_idx, trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """One line that stays."""
        if self._display is not None and self._training is not None:
            metrics = dict(trainer.progress_bar_metrics)
            self._display.keep(self._training.whole(trainer.batch_idx, metrics))
            self._wait()

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Nothing moves any more."""
        self._due = _NEVER

    # Evaluation
    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Show validation in place of training."""
        what = "sanity check" if trainer.sanity_checking else "validation"
        inside = self._training is not None and not trainer.sanity_checking
        title = f"{self._training.title} {what}" if inside and self._training else what
        self._open_evaluation(title, trainer.num_val_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Redraw if it is time."""
        self._count(trainer)

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        """One line that stays, except for the sanity check."""
        self._close_evaluation(trainer, keep=not trainer.sanity_checking)

    def on_test_start(self, trainer: Trainer, module: Module) -> None:
        """Begin at zero."""
        self._open_evaluation("test", trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Redraw if it is time."""
        self._count(trainer)

    def on_test_end(self, trainer: Trainer, module: Module) -> None:
        """One line that stays."""
        self._close_evaluation(trainer, keep=True)

    def on_predict_start(self, trainer: Trainer, module: Module) -> None:
        """Begin at zero."""
        self._open_evaluation("predict", trainer.num_predict_batches)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Redraw if it is time."""
        self._count(trainer)

    def on_predict_end(self, trainer: Trainer, module: Module) -> None:
        """One line that stays."""
        self._close_evaluation(trainer, keep=True)

    def _open_evaluation(self, title: str, batches: Sequence[float]) -> None:
        if self._display is None:
            return
        self._evaluation_began = monotonic()
        self._evaluating = Pace(title, sum(batches) if batches else math.inf)
        self._evaluated = 0
        self._wait()

    def _count(self, trainer: Trainer) -> None:
        self._evaluated += 1  # over all loaders, while batch_idx starts again with each
        if monotonic() < self._due:
            return
        if self._evaluating is not None:
            self._draw(self._evaluating, self._evaluated, trainer)

    def _close_evaluation(self, trainer: Trainer, *, keep: bool) -> None:
        if self._display is None or self._evaluating is None:
            return
        if keep:
            metrics = dict(trainer.progress_bar_metrics)
            self._display.keep(self._evaluating.whole(self._evaluated, metrics))
        self._evaluating = None
        now = monotonic()
        if self._training is not None:
            self._training.skip(now - self._evaluation_began, now)
        self._wait()

    # Drawing
    def _draw(self, pace: Pace, done: int, trainer: Trainer) -> None:
        assert self._display is not None
        pace.reach(done, monotonic())
        self._display.update(pace.now(dict(trainer.progress_bar_metrics)))
        self._wait()

    def _wait(self) -> None:
        """The next drawing is due one interval from now, so that a slow terminal gets fewer."""
        self._due = monotonic() + self._interval
