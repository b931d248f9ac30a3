"""Checkpoints that are written while training goes on: in order, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, Interrupted, Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from drivetrain.callbacks.base import Moment
from drivetrain_interfaces import ConfigurationError, DrivetrainError, StorageError
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from training_parts import Regression, loader

if TYPE_CHECKING:
    from pathlib import Path

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


class HeldIO(DirectoryCheckpointIO):
    """Writes in the background only when it may, and fails when it is told to.

    Args:
        fails: The save that meets a full disk, from 1.
    """

    def __init__(self, fails: int = 0) -> None:
        super().__init__()
        self.may = threading.Event()
        self.begun = 0
        self.fails = fails

    def begin_save(self, tree: Any, path: str, **how: Any) -> Any:
        self.begun += 1
        return super().begin_save(tree, path, **how)

    def _write(self, staged: Any, path: str) -> None:
        assert self.may.wait(60.0)
        if self.begun == self.fails:
            raise StorageError("No space left on device.", "Make room.")
        super()._write(staged, path)


class Do(Callback):
    """Calls a function at the end of each window, after checkpoints were considered."""

    saves_checkpoints = True

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Moment) -> None:
        if moment is Moment.STEP:
            self.act(trainer)


def _fit(folder: Path, io: Any, act: Any, *, model: Any = None, **checkpoint: Any) -> Any:
    seed_everything(3)
    saver = ModelCheckpoint(folder, every_n_train_steps=4, asynchronous=True, **checkpoint)
    trainer = Trainer(**QUIET, max_epochs=1, plugins=[io], callbacks=[saver, Do(act)])
    trainer.fit(model or Regression(), loader())
    return saver


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def test_training_goes_on_and_nothing_is_removed_before_its_successor_is_durable(
    tmp_path: Path,
) -> None:
    io, seen = HeldIO(), {}

    def look(trainer: Any) -> None:
        saver = trainer.callbacks[-2]
        seen[trainer.global_step] = (_names(tmp_path), os.path.basename(saver.last_model_path))
        if trainer.global_step == 6:
            io.may.set()
            saver._flight.save.wait()
            io.may.clear()
        if trainer.global_step == 10:
            io.may.set()

    saver = _fit(tmp_path, io, look, save_last=True)
    first, second, third = (f"epoch=0-step={step}.ckpt" for step in (4, 8, 12))
    assert seen[4] == seen[5] == seen[6] == ([], "")
    assert seen[7] == ([first, "last.ckpt"], first)
    assert seen[8] == seen[9] == seen[10] == seen[7]
    assert _names(tmp_path) == [third, "last.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == third
    assert saver.last_model_path.endswith(third)
    assert second not in _names(tmp_path)


def test_what_is_saved_is_the_state_of_its_step(tmp_path: Path) -> None:
    """Training changes the weights while they are written."""
    io, states = HeldIO(), {}

    def remember(trainer: Any) -> None:
        weights = {k: v.clone() for k, v in trainer.module.state_dict().items()}
        states[trainer.global_step] = weights
        if trainer.global_step % 4 == 3:
            io.may.set()
            if (flight := trainer.callbacks[-2]._flight) is not None:
                flight.save.wait()
            io.may.clear()
        if trainer.global_step == 12:
            io.may.set()

    _fit(tmp_path, io, remember, save_top_k=-1)
    for step in (4, 8, 12):
        tree = io.load(str(tmp_path / f"epoch=0-step={step}.ckpt"))
        assert tree["loop"]["global_step"] == step
        assert all(torch.equal(tree["module"][name], states[step][name]) for name in states[step])


def test_a_writer_that_fails_stops_the_run_soon_and_keeps_what_there_is(tmp_path: Path) -> None:
    io, steps = HeldIO(fails=2), []
    io.may.set()

    def wait(trainer: Any) -> None:
        steps.append(trainer.global_step)
        if (flight := trainer.callbacks[-2]._flight) is not None:
            while not flight.save.done():
                threading.Event().wait(0.001)

    with pytest.raises(StorageError, match="No space left"):
        _fit(tmp_path, io, wait)
    assert steps[-1] == 8
    assert _names(tmp_path) == ["epoch=0-step=4.ckpt"]


def test_a_disk_that_is_full_at_the_last_save_is_told(tmp_path: Path) -> None:
    io = HeldIO(fails=3)
    io.may.set()
    with pytest.raises(StorageError, match="No space left"):
        _fit(tmp_path, io, lambda trainer: None)
    assert _names(tmp_path) == ["epoch=0-step=8.ckpt"]


def test_an_error_in_training_does_not_lose_what_is_being_written(tmp_path: Path) -> None:
    io = HeldIO()

    def fail(trainer: Any) -> None:
        if trainer.global_step == 6:
            io.may.set()
            raise LookupError("lost")

    with pytest.raises(LookupError, match="lost"):
        _fit(tmp_path, io, fail)
    assert _names(tmp_path) == ["epoch=0-step=4.ckpt"]
    assert io.verify(str(tmp_path / "epoch=0-step=4.ckpt")) == []


def test_a_signal_waits_for_what_is_being_written_and_saves_once_more(tmp_path: Path) -> None:
    io = HeldIO()

    def stop(trainer: Any) -> None:
        if trainer.global_step == 6:
            io.may.set()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        _fit(tmp_path, io, stop, save_top_k=-1)
    assert _names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=0-step=6.ckpt"]


def test_what_cannot_be_encoded_is_refused_when_the_save_begins(tmp_path: Path) -> None:
    class Odd(Regression):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["odd"] = object()

    io = HeldIO()
    io.may.set()
    with pytest.raises(DrivetrainError, match="odd"):
        _fit(tmp_path, io, lambda trainer: None, model=Odd())
    assert _names(tmp_path) == []


def test_a_store_that_saves_only_in_the_foreground_is_refused_before_training(
    tmp_path: Path,
) -> None:
    class Plain:
        def save(self, tree: Any, path: str) -> None:
            raise AssertionError

        load = exists = remove = save

    with pytest.raises(ConfigurationError, match=r"asynchronous=True.*Plain"):
        _fit(tmp_path, Plain(), lambda trainer: None)


def test_two_ranks_save_in_the_background(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, asynchronous=True, save_last=True)
    trainer = Trainer(**QUIET, max_epochs=1, devices=2, launcher="fork", callbacks=[saver])
    trainer.fit(Regression(), loader())
    assert _names(tmp_path) == ["epoch=0-step=6.ckpt", "last.ckpt"]
