"""Saving checkpoints while training: when, under which name, and which to keep."""

from __future__ import annotations

import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from drivetrain_interfaces import (
    CheckpointError,
    ConfigurationError,
    StorageError,
    SupportsBackgroundSave,
)
from drivetrain_interfaces.errors import listed

from drivetrain.callbacks.base import Callback, Moment
from drivetrain.callbacks.monitor import Monitor
from drivetrain.callbacks.naming import check_template, fill, free_path, missing_fields
from drivetrain.callbacks.retention import Kept, Retention, Saved
from drivetrain.callbacks.triggers import When
from drivetrain.loggers.files import ensure_writable
from drivetrain.pointers import absolute, is_pointer, is_remote, point

if TYPE_CHECKING:
    from datetime import timedelta

    from drivetrain_interfaces import PendingSave

    from drivetrain.module import Module
    from drivetrain.trainer import Trainer

_log = logging.getLogger("drivetrain")
_LAST = "last"
_STEP = Moment.STEP  # looked up once: it is compared after every window
_NOWHERE = (-1, -1)


class _Verdict(NamedTuple):
    """What rank 0 decided and the others follow."""

    path: str = ""
    score: float | None = None
    wait: bool = False
    missing: tuple[str, ...] | None = None
    failed: str | None = None


class _Flight(NamedTuple):
    """A checkpoint that is being written, on rank 0.

    Attributes:
        save: Says how it goes.
        new: What it will be.
        before: What was kept before.
    """

    save: PendingSave
    new: Saved
    before: Kept


class ModelCheckpoint(Callback):
    """Saves checkpoints and keeps the best or the newest of them.

    Without a trigger it saves after every validation, at the end of an epoch that has none, and at
    the end of the fit. A monitored value counts only for the weights that it was measured on: a
    save that falls between two validations waits for the next one. At a step, a training metric
    has the value of the latest log point.

    Args:
        dirpath: The directory; ``checkpoints`` in the trainer's run directory by default.
        filename: The name, with fields for ``epoch``, ``step`` and any metric.
        monitor: The metric that decides what is best. None keeps the newest.
        mode: ``"min"`` if a smaller value is better, ``"max"`` if a larger is.
        save_top_k: How many to keep; -1 keeps all. 0 keeps none: then nothing is written, also
            not at an interrupt, unless ``save_last`` is set.
        save_last: Always save and keep the newest too, and let ``last.ckpt`` be a link to it.
        every_n_train_steps: Save after every so many applied optimizer steps.
        every_n_epochs: Save every so many epochs.
        train_time_interval: Save when so much time has passed since the last save. Rank 0's clock
            is asked at steps that are multiples of ``log_every_n_steps``.
        save_on_train_epoch_end: Whether epochs save at their end (True), at their validations
            (False), or at their end if they have no validation (None).
        save_weights_only: Leave out what only a resumed run needs.
        save_on_interrupt: Save when a signal stops the fit.
        auto_insert_metric_name: Whether ``{step}`` becomes ``step=5`` rather than ``5``.
        asynchronous: Go on training while a checkpoint is written, one at a time. The state is
            copied to the host first. How it went is looked at after each window; the fit does not
            end before the last one is durable.

    Raises:
        ConfigurationError: An argument has a value that means nothing.
    """

    saves_checkpoints = True

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str = "{epoch}-{step}",
        *,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_weights_only: bool = False,
        save_on_interrupt: bool = True,
        auto_insert_metric_name: bool = True,
        asynchronous: bool = False,
    ) -> None:
        seconds = train_time_interval.total_seconds() if train_time_interval else 0.0
        _check(save_top_k, every_n_train_steps, every_n_epochs, seconds)
        check_template(filename)
        by_default = not (every_n_train_steps or every_n_epochs or seconds)
        self.filename = filename
        self.save_last = save_last
        self.save_weights_only = save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self.asynchronous = asynchronous
        self._asked = None if dirpath is None else absolute(dirpath)
        self._dirpath = self._asked
        self._monitor = None if monitor is None else Monitor(monitor, mode, type(self).__name__)
        self._when = When(
            steps=every_n_train_steps or 0,
            epochs=1 if by_default else every_n_epochs or 0,
            seconds=seconds,
            at_epoch_end=save_on_train_epoch_end,
            at_interrupt=save_on_interrupt,
            at_end=by_default or save_last,
        )
        self._keep = Retention(save_top_k, mode == "max", monitor is not None, save_last)
        self._active = save_top_k != 0 or save_last
        self._watches_steps = self._active and self._when.watches_steps()
        self._flight: _Flight | None = None
        self._reset()

    def _reset(self) -> None:
        """A fit begins: nothing was saved. Files of an earlier fit are not this one's to remove."""
        if self._monitor is not None:
            self._monitor.reset()
        self._kept: Kept = ()
        self._leaving: Kept = ()
        self._flight = None
        self._restored = False
        self._epoch = 0
        self._began = -1
        self._owed = False
        self._considered = _NOWHERE
        self._saved_at = _NOWHERE
        self._validated_epoch = -1
        self._clock_step = 0
        self._clock = time.monotonic()
        self._link_path: str | None = None
        self._failure: Exception | None = None

    # What was saved
    @property
    def state_key(self) -> str:
        """Tells several checkpoint callbacks of one run apart."""
        name = None if self._monitor is None else (self._monitor.name, self._monitor.mode)
        when = (self._when.steps, self._when.epochs, self._when.seconds)
        return f"{type(self).__qualname__}[{name}, {when}, {self.filename!r}]"

    @property
    def dirpath(self) -> str | None:
        """The directory; None before the first fit if it was not given."""
        return self._dirpath

    def directory(self, trainer: Trainer) -> str:
        """Where this callback saves in a run of ``trainer``, whether or not that has begun."""
        return self._asked or absolute(os.path.join(trainer.run_dir, "checkpoints"))

    @property
    def best_k_models(self) -> dict[str, float]:
        """Scores by path of the kept checkpoints that have one, the best first."""
        return {saved.path: saved.score for saved in self._ranked() if saved.score is not None}

    @property
    def best_model_path(self) -> str:
        """The best kept checkpoint, the newest if nothing is monitored, empty if there is none."""
        ranked = self._ranked()
        if self._monitor is None:
            return self.last_model_path
        return ranked[0].path if ranked else ""

    @property
    def best_model_score(self) -> float | None:
        """The best score that a kept checkpoint has."""
        ranked = self._ranked()
        return ranked[0].score if ranked else None

    @property
    def kth_best_model_path(self) -> str:
        """The worst of the best: the next to be replaced."""
        ranked = self._ranked()
        return ranked[-1].path if ranked else ""

    @property
    def kth_value(self) -> float | None:
        """The score of ``kth_best_model_path``."""
        ranked = self._ranked()
        return ranked[-1].score if ranked else None

    @property
    def last_model_path(self) -> str:
        """The newest checkpoint that is durable, empty if there is none."""
        kept = self._durable()
        return kept[-1].path if kept else ""

    def _durable(self) -> Kept:
        """What is kept, without what is still being written; instead, what that is to replace."""
        if self._flight is None:
            return self._kept
        return self._flight.before

    def _ranked(self) -> Kept:
        """The best, without those whose score is not a number."""
        best = self._keep.best(self._durable())
        numbers = [each for each in best if each.score is not None and not math.isnan(each.score)]
        return tuple(numbers if self._keep.top_k < 0 else numbers[: self._keep.top_k])

    # Hooks
    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Make sure that the directory can be written, before any training is done.

        Raises:
            StorageError: It cannot be created or written.
        """
        if stage != "fit":
            return
        self._reset()
        if not self._active:
            return
        if self.asynchronous and not isinstance(trainer.checkpoint_io, SupportsBackgroundSave):
            raise ConfigurationError(
                f"{type(self).__name__} was asked to save with asynchronous=True, and "
                f"{type(trainer.checkpoint_io).__name__} saves only while training waits.",
                "Leave asynchronous out, or use a checkpoint IO with begin_save.",
            )
        found: tuple[str, tuple[str, str] | None] | None = None
        if trainer.is_global_zero:
            found = self._inspect(trainer)
        directory, problem = trainer.collectives.broadcast_object(found)
        self._dirpath = directory
        if problem is not None:
            raise StorageError(*problem)

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Take over what a restored state says."""
        self._epoch = trainer.current_epoch
        self._began = trainer.global_step
        self._clock = time.monotonic()
        if self._restored:
            self._restored = False
            self._look_after(trainer)

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Remember the epoch, whatever the counter does at its end."""
        self._epoch = trainer.current_epoch

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Learn where the monitored metric comes from."""
        if self._monitor is not None:
            self._monitor.validation_starts(trainer)

    def on_save_opportunity(self, trainer: Trainer, module: Module, moment: Moment) -> None:
        """Save if a checkpoint is due.

        Raises:
            ConfigurationError: The monitored metric is not logged.
        """
        if self._flight is not None and self._flight.save.done():
            self._land(trainer)
        if moment is _STEP:
            if self._watches_steps and self._due_at_step(trainer):
                self._consider(trainer, moment)
            return
        if moment is Moment.VALIDATION:
            self._validated_epoch = self._epoch
            if self._monitor is not None:
                self._monitor.validation_ends(trainer)
        if self._active and self._due(trainer, moment):
            self._consider(trainer, moment)

    # When
    def _due_at_step(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        due = self._when.due_at_step(step)
        if self._when.seconds:
            due = self._time_is_up(trainer, step) or due
        return due and (step, self._epoch) != self._considered

    def _time_is_up(self, trainer: Trainer, step: int) -> bool:
        """Rank 0's clock, asked by all ranks at the same steps."""
        if step == self._clock_step or step % trainer.log_every_n_steps:
            return False
        self._clock_step = step
        up = time.monotonic() - self._clock >= self._when.seconds
        return bool(trainer.collectives.broadcast_object(up))

    def _due(self, trainer: Trainer, moment: Moment) -> bool:
        step, here = trainer.global_step, (trainer.global_step, self._epoch)
        validated = self._validated_epoch == self._epoch
        due = self._when.due(moment, step, self._epoch, validated=validated)
        if moment is Moment.INTERRUPTED:
            return due and here != self._saved_at and step != self._began
        if moment is Moment.END:
            return (due or self._owed) and here != self._considered and step != self._began
        return (due or self._owed) and here != self._considered

    # What
    def _consider(self, trainer: Trainer, moment: Moment) -> None:
        """Let rank 0 decide, and do what it says on every rank."""
        verdict = self._decide(trainer, moment) if trainer.is_global_zero else None
        verdict = _Verdict(*trainer.collectives.broadcast_object(verdict))
        if verdict.failed is not None:
            raise self._failure or CheckpointError(
                f"Rank 0 could not save a checkpoint: {verdict.failed}", "See rank 0's error."
            )
        if verdict.missing is not None and self._monitor is not None:
            raise self._monitor.missing(list(verdict.missing))
        if verdict.wait:
            self._owed = True
            return
        self._owed = False
        self._considered = (trainer.global_step, self._epoch)
        if verdict.path:
            self._save(trainer, Saved(verdict.path, trainer.global_step, verdict.score))

    def _decide(self, trainer: Trainer, moment: Moment) -> _Verdict:
        monitor = self._monitor
        if moment is Moment.INTERRUPTED or monitor is None:
            # A validation that was cut short leaves values that score nothing.
            score = None
        elif (value := monitor.value(trainer)) is None:
            if moment is Moment.END:
                self._warn_of_no_score(trainer, monitor)
            elif moment is Moment.EPOCH and not monitor.may_still_come(trainer):
                return _Verdict(missing=tuple(trainer.callback_metrics))
            else:
                return _Verdict(wait=True)
            score = None
        elif monitor.is_old(trainer):
            if moment is not Moment.END:
                return _Verdict(wait=True)
            score = None
        else:
            score = value
        forced = moment is Moment.INTERRUPTED or (moment is Moment.END and score is None)
        if not (forced or self._keep.wants(self._kept, score)):
            return _Verdict(score=score)
        try:
            self._land(trainer)  # one at a time, and its successor may take its place
        except (CheckpointError, StorageError) as error:
            self._failure = error
            return _Verdict(failed=str(error))
        return _Verdict(self._path(trainer, score), score)

    def _warn_of_no_score(self, trainer: Trainer, monitor: Monitor) -> None:
        _log.warning(
            "%s watches %r, which never had a value in this fit (logged: %s); "
            "the last state is saved without a score.",
            type(self).__name__,
            monitor.name,
            listed(trainer.callback_metrics),
        )

    # Where
    def _path(self, trainer: Trainer, score: float | None) -> str:
        """A path that overwrites nothing but what this save is going to replace."""
        assert self._dirpath is not None
        values: dict[str, float] = {
            name: float(value) for name, value in trainer.callback_metrics.items()
        }
        values |= {"epoch": self._epoch, "step": trainer.global_step}
        for field in missing_fields(self.filename, values):
            _log.warning(
                "The checkpoint filename %r asks for %r, which has no value (logged: %s).",
                self.filename,
                field,
                listed(trainer.callback_metrics),
            )
        name = fill(self.filename, values, insert_names=self.auto_insert_metric_name)
        replaced = self._keep.after(self._kept, Saved("", trainer.global_step, score))[1]
        ours = {saved.path for saved in replaced}
        reserved = self._link(trainer) if self.save_last else ""
        return free_path(
            self._dirpath,
            name,
            lambda path: path == reserved or (path not in ours and _taken(path, trainer)),
        )

    def _link(self, trainer: Trainer) -> str:
        """Where the link to the newest checkpoint is, or goes: never in place of a real file."""
        assert self._dirpath is not None
        if self._link_path is None:
            self._link_path = free_path(
                self._dirpath,
                _LAST,
                lambda path: _taken(path, trainer) and not is_pointer(path, trainer.checkpoint_io),
            )
        return self._link_path

    # Writing
    def _save(self, trainer: Trainer, new: Saved) -> None:
        """Write, point the link to it, and only then remove what is not kept any more."""
        before = self._kept, self._saved_at
        # The records change first, because the checkpoint holds this callback's state.
        self._kept, self._leaving = self._keep.after(self._kept, new)
        self._saved_at = (trainer.global_step, self._epoch)
        try:
            if self.asynchronous:
                save = trainer.begin_checkpoint(new.path, weights_only=self.save_weights_only)
                self._flight = None if save is None else _Flight(save, new, before[0])
            else:
                trainer.save_checkpoint(new.path, weights_only=self.save_weights_only)
        except BaseException:
            self._kept, self._saved_at = before
            raise
        self._clock = time.monotonic()
        if trainer.is_global_zero and not self.asynchronous:
            self._settle(trainer, new)

    def _land(self, trainer: Trainer) -> None:
        """Wait for what is being written, and do what follows. Raises what went wrong."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            flight.save.wait()
        except BaseException:
            # What was to make room for it stays.
            self._kept, self._leaving = flight.before, ()
            raise
        self._settle(trainer, flight.new)

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Return once the last checkpoint is durable.

        Raises:
            CheckpointError: It could not be saved; on every rank.
            StorageError: The same.
        """
        if not self.asynchronous:
            return
        problem: Exception | None = None
        try:
            self._land(trainer)
        except (CheckpointError, StorageError) as error:
            problem = error
        said = trainer.collectives.broadcast_object(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if said is not None:
            raise CheckpointError(
                f"Rank 0 could not save the last checkpoint: {said}", "See rank 0's error."
            )

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Also after an error or a second signal: what is being written is written to its end."""
        try:
            self._land(trainer)
        except (CheckpointError, StorageError) as error:
            _log.error("The checkpoint that was being written is lost: %s", error)

    def _settle(self, trainer: Trainer, new: Saved) -> None:
        """Point the link to what is now durable, and then remove what has made room for it."""
        if self.save_last:
            point(self._link(trainer), new.path, trainer.checkpoint_io)
        leaving, self._leaving = self._leaving, ()
        for saved in leaving:  # never the new one
            trainer.checkpoint_io.remove(saved.path)

    def _inspect(self, trainer: Trainer) -> tuple[str, tuple[str, str] | None]:
        """The directory, and what is wrong with it. A store is asked by the first save."""
        directory = self.directory(trainer)
        try:
            if not is_remote(directory):
                ensure_writable(directory, type(self).__name__)
        except StorageError as error:
            return directory, (error.message, error.hint)
        return directory, None

    # State
    def state_dict(self) -> dict[str, Any]:
        """What was saved and considered; no file is opened with it."""
        return {
            "directory": self._dirpath,
            "kept": [
                {"name": os.path.basename(saved.path), "step": saved.step, "score": saved.score}
                for saved in self._kept
            ],
            # Known to the checkpoint that takes their place, should this process not get so far.
            "leaving": [os.path.basename(saved.path) for saved in self._leaving],
            "considered": list(self._considered),
            "saved_at": list(self._saved_at),
            "validated_epoch": self._validated_epoch,
            "monitor": None if self._monitor is None else self._monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what is known of the files; when training goes on, they are looked for."""
        directory = state["directory"] or ""
        self._dirpath = self._dirpath or state["directory"]
        self._kept = tuple(
            Saved(os.path.join(directory, item["name"]), item["step"], item["score"])
            for item in state["kept"]
        )
        self._leaving = tuple(
            Saved(os.path.join(directory, name), 0) for name in state.get("leaving", ())
        )
        self._considered = tuple(state["considered"])
        self._saved_at = tuple(state["saved_at"])
        self._validated_epoch = state["validated_epoch"]
        if self._monitor is not None and state["monitor"] is not None:
            self._monitor.load_state_dict(state["monitor"])
        self._restored = True

    def _look_after(self, trainer: Trainer) -> None:
        """Go on with the files of the resumed run: those in this directory that still exist."""
        kept = tuple(each for each in self._kept if os.path.dirname(each.path) == self._dirpath)
        if trainer.is_global_zero:
            if len(kept) < len(self._kept):
                _log.warning(
                    "The resumed run saved to %s and this one saves to %s; "
                    "the checkpoints of the former stay and are not counted.",
                    os.path.dirname(self._kept[0].path),
                    self._dirpath,
                )
            kept = tuple(each for each in kept if trainer.checkpoint_io.exists(each.path))
            ours = tuple(e for e in self._leaving if os.path.dirname(e.path) == self._dirpath)
            self._leaving = ours
            if kept and ours:
                # The process was killed after it had saved: what it had still to do is done now.
                self._settle(trainer, kept[-1])
        rows = trainer.collectives.broadcast_object([(s.path, s.step, s.score) for s in kept])
        self._kept = tuple(Saved(*row) for row in rows)


def _check(top_k: int, steps: int | None, epochs: int | None, seconds: float) -> None:
    problems = []
    if top_k < -1:
        problems.append((f"save_top_k={top_k} means nothing.", "Use -1 for all, or 0 and more."))
    for name, count in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if count is not None and count < 0:
            problems.append((f"{name}={count} is negative.", "Use a count, or None for never."))
    if seconds < 0:
        problems.append(("train_time_interval is negative.", "Use a positive timedelta."))
    if problems:
        raise ConfigurationError.conflicts(problems)


def _taken(path: str, trainer: Trainer) -> bool:
    """Whether anything is there, in the file system or where the checkpoint IO keeps it."""
    return os.path.lexists(path) or trainer.checkpoint_io.exists(path)
