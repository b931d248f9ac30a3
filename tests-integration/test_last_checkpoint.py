"""``ckpt_path="last"``: the newest complete and verified checkpoint, and what it left out."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain import Callback, Trainer
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_interfaces import CheckpointError, StorageError
from training_parts import Regression, loader

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def _fit(folder: Path, epochs: int, resume: Any = "last", **more: Any) -> Trainer:
    every = {"every_n_train_steps": 4, "save_top_k": -1, **more.pop("checkpoint", {})}
    saver = ModelCheckpoint(folder, **every)
    trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=[saver], **more)
    trainer.fit(Regression("sgd"), loader(), ckpt_path=resume)
    return trainer


def _said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_script_that_asks_for_the_last_one_can_be_started_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _fit(tmp_path, 1).global_step == 12
    assert "begins anew" in _said(caplog)
    caplog.clear()
    trainer = _fit(tmp_path, 2)
    assert trainer.global_step == 24
    assert "begins anew" not in _said(caplog)
    # The files of the first run were taken over, not written again under other names.
    steps = [4, 8, 12, 16, 20, 24]
    names = {f"epoch={(step - 1) // 12}-step={step}.ckpt" for step in steps}
    assert {path.name for path in tmp_path.iterdir()} == names


DAMAGE = {
    "a flipped bit": (lambda path: _flip(path / "tensors.safetensors"), "tensors.safetensors"),
    "a file cut off": (lambda path: os.truncate(path / "state.json", 9), "state.json"),
    "a missing file": (lambda path: (path / "tensors.safetensors").unlink(), "tensors"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "an empty directory": (lambda path: [each.unlink() for each in path.iterdir()], "manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_left_out_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    trainer = _fit(tmp_path, 1)
    newest = Path(trainer.callbacks[-1].last_model_path)  # type: ignore[attr-defined]
    harm, name = DAMAGE[damage]
    harm(newest)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert _fit(tmp_path, 2).global_step == 24
    said = _said(caplog)
    assert said.count(f"leaves out {newest}") == 1
    assert name in said
    assert f"goes on from {tmp_path / 'epoch=0-step=8.ckpt'}" in said


def test_weights_alone_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _fit(tmp_path, 1, checkpoint={"save_weights_only": True, "every_n_train_steps": 12})
    with pytest.raises(CheckpointError, match="weights alone"):
        _fit(tmp_path, 2)


def test_if_none_can_be_used_all_reasons_are_given(tmp_path: Path) -> None:
    _fit(tmp_path, 1)
    for path in tmp_path.iterdir():
        _flip(path / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"none of 3 .*step=12(.|\n)*step=8(.|\n)*step=4"):
        _fit(tmp_path, 2)


def test_the_newest_of_several_directories_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _fit(first, 1)
    _fit(second, 2, first / "epoch=0-step=12.ckpt")
    begins = Begins()
    callbacks = [ModelCheckpoint(first), ModelCheckpoint(second, filename="other"), begins]
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=callbacks)
    trainer.fit(Regression("sgd"), loader(), ckpt_path="last")
    assert begins.step == 24


class Begins(Callback):
    """Notes the step that training begins at."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.step = trainer.global_step


def test_a_moved_directory_with_its_link_goes_on(tmp_path: Path) -> None:
    _fit(tmp_path / "here", 1, checkpoint={"save_last": True, "save_top_k": 1})
    assert (tmp_path / "here" / "last.ckpt").is_symlink()
    shutil.move(tmp_path / "here", tmp_path / "there")
    for resume in ("last", tmp_path / "there" / "last.ckpt"):
        assert _fit(tmp_path / "there", 2, resume).global_step == 24


def test_two_ranks_agree_on_it(tmp_path: Path) -> None:
    newest = Path(_fit(tmp_path, 1).callbacks[-1].last_model_path)  # type: ignore[attr-defined]
    _flip(newest / "tensors.safetensors")
    trainer = _fit(tmp_path, 2, devices=2, launcher="fork")
    assert trainer.current_epoch == 2
    # From step 8 of 12, the last 16 samples in two steps of eight, and six for the second epoch.
    assert trainer.global_step == 8 + 2 + 6


def test_evaluation_needs_one(tmp_path: Path) -> None:
    trainer = Trainer(**QUIET, callbacks=[ModelCheckpoint(tmp_path)])
    with pytest.raises(StorageError, match="no checkpoint in"):
        trainer.validate(Regression(), loader(), ckpt_path="last")


class InMemory:
    """A store of four members, with neither links nor a list."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def save(self, tree: Any, path: str) -> None:
        self.kept[path] = tree

    def load(self, path: str) -> Any:
        return self.kept[path]

    def exists(self, path: str) -> bool:
        return path in self.kept

    def remove(self, path: str) -> None:
        self.kept.pop(path, None)


def test_a_store_without_links_gets_a_name_that_stands_for_the_newest(tmp_path: Path) -> None:
    store = InMemory()
    checkpoint = {"save_last": True, "save_top_k": 1}
    _fit(tmp_path, 1, None, plugins=[store], checkpoint=checkpoint)
    last = str(tmp_path / "last.ckpt")
    assert store.kept[last] == {"same_as": "epoch=0-step=12.ckpt"}
    assert len(store.kept) == 2
    assert _fit(tmp_path, 2, last, plugins=[store], checkpoint=checkpoint).global_step == 24
    assert store.kept[last] == {"same_as": "epoch=1-step=24.ckpt"}
    assert len(store.kept) == 2
    assert list(tmp_path.iterdir()) == []


def test_weights_come_through_the_link(tmp_path: Path) -> None:
    _fit(tmp_path, 1, checkpoint={"save_last": True})
    model = Regression.load_from_checkpoint(str(tmp_path / "last.ckpt"))
    other = Regression.load_from_checkpoint(str(tmp_path / "epoch=0-step=12.ckpt"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
