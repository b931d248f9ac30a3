"""The training loop: windows of batches, and what happens between them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import DataError, ManualStep, UserCodeError

from drivetrain.callbacks.base import Moment
from drivetrain.evaluate import evaluate
from drivetrain.exchange import gather_objects
from drivetrain.signals import SignalAction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drivetrain_interfaces import StepResult

    from drivetrain.counters import Progress
    from drivetrain.datamodule import DataModule
    from drivetrain.evaluate import Evaluation
    from drivetrain.feeds import Feed
    from drivetrain.hooks import Hooks
    from drivetrain.losses import LossWatch
    from drivetrain.manual import ManualOptimizer
    from drivetrain.metrics import Metrics
    from drivetrain.module import Module
    from drivetrain.optim import Scheduled
    from drivetrain.runtime import Stack
    from drivetrain.settings import Settings
    from drivetrain.stopping import StopRequest
    from drivetrain.trainer import Trainer
    from drivetrain.watching import Watch
    from drivetrain.windows import AutomaticWindow, ManualWindow


@dataclass(slots=True)
class FitRun:
    """Everything that one fit needs, resolved before the first batch.

    Attributes:
        train_window: Trains on one window of batches.
        limit: Batches per epoch, or None if the loader has no length.
        sample_offset: Samples of this epoch that were seen before position 0 of this world size.
        stopped: Whether the run has stopped before its limit.
        windows: Windows begun by this process.
        entered: Windows of this epoch that had data, by this process.
        deadline: Monotonic time at which the run stops, or None.
    """

    trainer: Trainer
    module: Module
    datamodule: DataModule | None
    stack: Stack
    settings: Settings
    hooks: Hooks
    progress: Progress
    feed: Feed
    validation: Evaluation | None
    schedulers: list[Scheduled]
    metrics: Metrics
    losses: LossWatch
    stop: StopRequest
    watch: Watch
    train_window: AutomaticWindow | ManualWindow
    seed: int
    limit: int | None
    manual_optimizers: list[ManualOptimizer] = field(default_factory=list)
    deadline: float | None = None
    sample_offset: int = 0
    stopped: bool = False
    windows: int = 0
    entered: int = 0
    started: float = field(default_factory=time.monotonic)
    restore_rng: Callable[[], None] | None = None

    @property
    def manual_step(self) -> ManualStep:
        """The step of manual optimization. Raises ``UserCodeError`` in automatic optimization."""
        step = self.train_window.step
        if self.module.automatic_optimization or not isinstance(step, ManualStep):
            raise UserCodeError(
                f"{type(self.module).__name__} called manual_backward in automatic optimization.",
                "Set automatic_optimization = False, or return the loss and leave it out.",
            )
        return step

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.progress.elapsed + time.monotonic() - self.started

    @property
    def samples_seen(self) -> int:
        """Samples of this epoch that all ranks have seen; 0 if the loader cannot count them."""
        return self.progress.batch * self.feed.round_size + self.sample_offset

    @property
    def finished(self) -> bool:
        """Whether a limit is reached or somebody asked to stop."""
        settings, progress = self.settings, self.progress
        return (
            self.stopped
            or self.trainer.should_stop
            or (settings.max_epochs is not None and progress.epoch >= settings.max_epochs)
            or 0 <= settings.max_steps <= progress.global_step
        )


def fit(run: FitRun) -> None:
    """Train until a limit, a stop, or the end of ``max_epochs``."""
    run.hooks.call("on_train_start")
    while not run.finished:
        _epoch(run)
    run.losses.check(run.progress.epoch, run.progress.attempts)
    # Before on_train_end, so that the file holds exactly the state that training ended with.
    if not run.stopped:
        _offer_save(run, Moment.END)
    elif run.stop.action is not SignalAction.STOP:
        _offer_save(run, Moment.INTERRUPTED)
    run.hooks.call("on_train_end")


def _epoch(run: FitRun) -> None:
    progress = run.progress
    if not progress.epoch_open:
        _restore_rng(run)  # the hooks and the loader draw what they would have drawn
        run.hooks.call("on_train_epoch_start")
        progress.epoch_open = True
    with_samples = run.samples_seen if run.feed.round_size else None
    stream = run.feed.open(progress.epoch, progress.batch, with_samples)
    if run.limit is not None:
        stream = islice(stream, max(0, run.limit - progress.batch))
    # Inside an epoch the loader has drawn before, so the restored state comes after it is opened.
    _restore_rng(run)
    ended = (
        run.limit is not None and progress.batch >= run.limit
    )  # a checkpoint of the epoch's last batch: only validation and the end hooks are owed
    size = run.settings.accumulate_grad_batches
    if not ended and _validation_due(run, progress.batch - size) and not _validate(run):
        return
    if not _windows(run, stream):
        return
    owed = _validates_at_epoch_end(run) and progress.validated_at != progress.batch
    if owed and not _validate(run):
        return
    _end_epoch(run)


def _restore_rng(run: FitRun) -> None:
    """Take over the random numbers of the checkpoint, once."""
    if run.restore_rng is not None:
        run.restore_rng()
        run.restore_rng = None


def _windows(run: FitRun, stream: Iterator[Any]) -> bool:
    """Train on the rest of an epoch; False if the run ended inside it."""
    progress, settings, train_window = run.progress, run.settings, run.train_window
    size, log_every = settings.accumulate_grad_batches, settings.log_every_n_steps
    starts = run.hooks.table("on_train_batch_start", 2)
    ends = run.hooks.table("on_train_batch_end", 3)
    savers = run.hooks.table("on_save_opportunity", 1)
    step_schedulers = [each for each in _automatic(run) if each.interval == "step"]
    validates_inside = run.validation is not None and _interval(run) is not None
    cut = False
    run.stop.settle(partial(_any_rank, run))
    while _may_begin(run):
        window = list(islice(stream, size))
        first, before = progress.batch, progress.global_step
        if starts and _cut_short(starts, window, first):
            stream, cut = iter(()), True
        if not window:
            return _data_ended(run, cut=cut)
        run.entered += 1
        result = train_window(window, first)
        progress.batch = first + len(window)
        if result is not None:
            _count(run, result)
        updated = progress.global_step != before
        if updated:
            for each in step_schedulers:
                _step_scheduler(run, each, progress.global_step)
        if ends:
            _tell_batch_end(ends, window, first, train_window.outputs(result))
        if updated and progress.global_step % log_every == 0:
            log_point(run, result)
        for save in savers:
            save(Moment.STEP)
        if validates_inside and _validation_due(run, first) and not _validate(run):
            return False
        if run.trainer.should_stop or 0 <= settings.max_steps <= progress.global_step:
            return _reached_end(run)
    run.windows -= 1
    run.stopped = True
    return False


def _data_ended(run: FitRun, *, cut: bool) -> bool:
    """The loader has no more for this epoch. True, once no other rank has more either."""
    run.windows -= 1
    if not run.progress.batch and not cut:
        raise DataError(
            f"The train loader gave no batch in epoch {run.progress.epoch}.",
            "Give an iterable that can be read once per epoch and holds data.",
        )
    if run.limit is None or run.progress.batch < run.limit:
        run.watch.end_epoch(run.progress.epoch, run.entered)
    return True


def _any_rank(run: FitRun, here: bool) -> bool:  # noqa: FBT001 - a fact of this rank
    stack = run.stack
    return any(gather_objects(here, stack.collectives, stack.strategy.device))


def _may_begin(run: FitRun) -> bool:
    """Count the next window; False if the run stops before it."""
    run.windows += 1
    if run.deadline is not None and time.monotonic() >= run.deadline:
        # Clocks of ranks differ, so they agree on the boundary as they do for a signal.
        run.deadline = None
        run.stop.ask()
    return run.stop.begin(run.windows)


def _count(run: FitRun, result: StepResult) -> None:
    """Counters follow what was applied, not what was tried."""
    run.losses.add(result.loss)
    if result.applied:
        run.progress.global_step += 1
    else:
        run.progress.skipped += 1
        run.hooks.call("on_step_skipped")


def _tell_batch_end(
    ends: tuple[Callable[..., Any], ...], window: list[Any], first: int, outputs: list[Any]
) -> None:
    for offset, batch in enumerate(window):
        for call in ends:
            call(outputs[offset], batch, first + offset)


def _cut_short(starts: tuple[Callable[..., Any], ...], window: list[Any], first: int) -> bool:
    """Call the batch-start hooks; a hook that returns -1 ends the epoch before its batch."""
    for offset, batch in enumerate(window):
        # A list, not a generator: every hook is called, also after one returned -1.
        if -1 in [call(batch, first + offset) for call in starts]:
            del window[offset:]
            return True
    return False


def _reached_end(run: FitRun) -> bool:
    """Whether the window that reached a limit was also the last of its epoch."""
    return run.limit is not None and run.progress.batch >= run.limit


def log_point(run: FitRun, result: StepResult | None) -> None:
    """Read back what was logged, check the losses, and hand values to whoever wants them."""
    run.losses.check(run.progress.epoch, run.progress.attempts)
    logged = run.metrics.step_values()
    if result is not None and result.grad_norm is not None:
        logged.everything["grad_norm"] = logged.logger["grad_norm"] = float(result.grad_norm)
    run.trainer.publish(logged)


def _refresh(run: FitRun) -> None:
    """Let callbacks see the newest step values, also where an epoch is shorter than a log point."""
    logged = run.metrics.step_values()
    logged.logger.clear()
    run.trainer.publish(logged)


def _end_epoch(run: FitRun) -> None:
    run.losses.check(run.progress.epoch, run.progress.attempts)
    metrics = run.metrics
    _refresh(run)
    run.trainer.publish(metrics.epoch_values())
    metrics.between_batches = True
    run.hooks.call("on_train_epoch_end")
    metrics.between_batches = False
    run.trainer.publish(metrics.epoch_values())
    for each in _automatic(run):
        if each.interval == "epoch":
            _step_scheduler(run, each, run.progress.epoch + 1)
    run.entered = 0
    run.progress.next_epoch()
    run.sample_offset = 0
    _offer_save(run, Moment.EPOCH)


def _automatic(run: FitRun) -> list[Scheduled]:
    """The schedulers that the loop steps; in manual optimization the user's code does."""
    return run.schedulers if run.module.automatic_optimization else []


def _step_scheduler(run: FitRun, each: Scheduled, count: int) -> None:
    if count % each.frequency:
        return
    if each.needs_metric:
        each.scheduler.step(run.trainer.metric(each.monitor, "configure_optimizers"))
    else:
        each.scheduler.step()


def _offer_save(run: FitRun, moment: Moment) -> None:
    for save in run.hooks.table("on_save_opportunity", 1):
        save(moment)


def _validate(run: FitRun) -> bool:
    """Validate; False if a stop came before its end, so that it is still owed after a resume."""
    assert run.validation is not None
    _refresh(run)
    evaluate(run.validation)
    if run.validation.cut_short:
        run.stopped = True
        return False
    run.progress.validated_at = run.progress.batch
    _offer_save(run, Moment.VALIDATION)
    return True


def _interval(run: FitRun) -> int | None:
    """Batches between validations inside an epoch; None where there is none inside."""
    asked = run.settings.val_check_interval
    if run.validation is None or asked is None:
        return None
    if isinstance(asked, int):
        return asked
    return None if run.limit is None else max(1, int(run.limit * asked))


def _validation_due(run: FitRun, before: int) -> bool:
    """Whether a multiple of the interval was passed between ``before`` and the current batch."""
    every, now = _interval(run), run.progress.batch
    if every is None or not _validates_this_epoch(run) or run.progress.validated_at == now:
        return False
    return now > 0 and now // every > max(before, 0) // every


def _validates_this_epoch(run: FitRun) -> bool:
    return (
        run.validation is not None
        and (run.progress.epoch + 1) % run.settings.check_val_every_n_epoch == 0
    )


def _validates_at_epoch_end(run: FitRun) -> bool:
    every = _interval(run)
    return _validates_this_epoch(run) and (every is None or run.progress.batch % every == 0)
