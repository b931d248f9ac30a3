"""Killed, saved anywhere, resumed: always the same run, bit for bit."""

from __future__ import annotations

import json
import random
import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from drivetrain import Callback, Interrupted, Trainer, seed_everything
from drivetrain.callbacks import EarlyStopping, ModelCheckpoint
from drivetrain.callbacks.base import Moment
from drivetrain_interfaces import CheckpointError
from training_parts import At, Recorder, Regression, loader

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Running, Starter

EPOCHS = 3
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 4,
}


def _events(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / f"events-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _asked(out: Path, ranks: int, **more: Any) -> str:
    out.mkdir(exist_ok=True)
    steps = EPOCHS * 12 // ranks
    asked = {
        "out": str(out),
        "model": {"total_steps": steps},
        "trainer": {"max_epochs": EPOCHS, "devices": ranks, "default_root_dir": str(out)},
        "checkpoint": {"dirpath": str(out / "saved"), "every_n_train_steps": 2, "save_last": True},
        **more,
    }
    return json.dumps(asked)


# Killed


def _killed(start: Starter, out: Path, ranks: int, epoch: int, batch: int, **more: Any) -> Running:
    """A run whose rank 0 stops inside an epoch, and whose processes are killed there."""
    running = start("train.py", _asked(out, ranks, at=[["wait", 0, epoch, batch]], **more))
    running.wait_for("here")
    running.signal_all(signal.SIGKILL)
    assert running.finish() == -signal.SIGKILL
    assert running.left_behind() == []
    return running


@pytest.mark.parametrize(
    ("ranks", "deaths"), [(2, [(1, 3), (2, 2)]), (1, [(1, 7)])], ids=["two-ranks", "one-rank"]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    start: Starter, ranks: int, deaths: list[tuple[int, int]]
) -> None:
    whole, broken = start.folder / "whole", start.folder / "broken"
    start.run("train.py", _asked(whole, ranks))
    more: dict[str, Any] = {}
    for epoch, batch in deaths:
        _killed(start, broken, ranks, epoch, batch, **more)
        more = {"resume": str(broken / "saved" / "last.ckpt")}
    start.run("train.py", _asked(broken, ranks, **more))

    assert json.loads((broken / "done.json").read_text()) == json.loads(
        (whole / "done.json").read_text()
    )
    for rank in range(ranks):
        expected = _without_starts(_events(whole, rank))
        found = _without_starts(_events(broken, rank))
        # What was done twice, since the last checkpoint, was the same both times.
        again = {json.dumps(event, sort_keys=True) for event in found}
        assert again == {json.dumps(event, sort_keys=True) for event in expected}
        # And the last process did exactly what was left, in order.
        last = _of_the_last_process(_events(broken, rank))
        assert last == expected[-len(last) :]
        assert 0 < len(last) < len(expected)


def _without_starts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] != "train_start"]


def _of_the_last_process(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    starts = [n for n, event in enumerate(events) if event["event"] == "train_start"]
    return events[starts[-1] + 1 :]


# Saved at any moment


class SaveAlways(Callback):
    """Saves whenever it can: after windows (also skipped ones), validations, epochs, and the fit.

    Attributes:
        paths: Each file, and how many events had happened when it was saved.
    """

    saves_checkpoints = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[tuple[int, Path]] = []

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Moment) -> None:
        name = f"{trainer.current_epoch}-{trainer.batch_idx}-{moment.value}.ckpt"
        trainer.save_checkpoint(self.folder / name)
        self.paths.append((len(_events(self.folder)), self.folder / name))


class Noisy(Regression):
    """Draws from every generator of the host."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        noise = random.random() + np.random.rand()
        return super().training_step(batch, batch_idx) * (1 + 0.01 * noise)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "validating-inside": {"val_check_interval": 3},
    "validating-by-fraction": {"val_check_interval": 0.25, "accumulate_grad_batches": 2},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "limited": {"limit_train_batches": 5, "max_steps": 8, "max_epochs": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resume_from_any_moment_does_exactly_what_was_left(tmp_path: Path, variant: str) -> None:
    settings = {**QUIET, "max_epochs": 2, "logger": False, **VARIANTS[variant]}
    whole = tmp_path / "whole"
    whole.mkdir()
    seed_everything(5)
    saver = SaveAlways(whole)
    trainer = Trainer(**settings, callbacks=[saver, Recorder(str(whole))])
    trainer.fit(Noisy(), loader(28), loader(16, shuffle=False))
    expected = _events(whole)
    assert len(saver.paths) > 3

    for done, path in saver.paths:
        part = tmp_path / path.stem
        part.mkdir()
        seed_everything(99)  # what a resumed run starts with does not matter
        again = Trainer(**settings, callbacks=[Recorder(str(part))])
        again.fit(Noisy(), loader(28), loader(16, shuffle=False), ckpt_path=path)
        found = _events(part)
        batches = sum(event["event"] == "batch" for event in expected[:done])
        assert found[0] == {**found[0], "event": "train_start", "batches_seen": batches}
        assert found[1:] == expected[done:], path.name


def test_a_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    """The first updates overflow, so that a fresh scale would skip updates again."""
    settings = {**QUIET, "precision": "16-mixed", "logger": False}
    first, second = Skips(), Skips()
    saver = SaveAlways(tmp_path)
    trainer = Trainer(**settings, max_epochs=1, callbacks=[saver, first, Recorder(str(tmp_path))])
    trainer.fit(Loud(), loader())
    assert first.count > 0
    later = Trainer(**settings, max_epochs=2, callbacks=[second])
    later.fit(Loud(), loader(), ckpt_path=saver.paths[-1][1])
    assert second.count == 0


class Loud(Regression):
    """Losses that are too large for the first scale."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * 300


class Skips(Callback):
    """Counts updates that were not applied."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_skipped(self, trainer: Any, module: Any) -> None:
        self.count += 1


def test_what_the_last_batch_of_an_epoch_still_owes_runs_once(tmp_path: Path) -> None:
    saver = SaveAlways(tmp_path)
    settings = {**QUIET, "max_epochs": 2, "logger": False}
    Trainer(**settings, callbacks=[saver, Recorder(str(tmp_path))]).fit(
        Regression(), loader(), loader(16, shuffle=False)
    )
    path = tmp_path / "0-12-step.ckpt"
    part = tmp_path / "part"
    part.mkdir()
    Trainer(**settings, callbacks=[Recorder(str(part))]).fit(
        Regression(), loader(), loader(16, shuffle=False), ckpt_path=path
    )
    names = [event["event"] for event in _events(part)]
    beginning = ["train_start", "validation_end", "epoch_end", "epoch_start", "batch"]
    assert names[:5] == beginning
    assert [names.count(name) for name in ("validation_end", "epoch_end")] == [2, 2]


# Stopped


class Signals(Callback):
    """Sends a signal to its own process in a hook of an epoch's batch.

    Args:
        hook: The hook.
        place: Epoch, and batches done.
    """

    def __init__(self, hook: str, place: tuple[int, int]) -> None:
        self.place = place
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer: Any, *args: Any) -> None:
        if (trainer.current_epoch, trainer.batch_idx) == self.place:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("on_train_batch_start", (1, 2)),
        ("on_train_batch_end", (1, 7)),
        ("on_validation_batch_end", (0, 7)),
        ("on_validation_end", (0, 7)),
        ("on_train_epoch_end", (0, 7)),
        ("on_train_epoch_start", (1, 0)),
    ],
)
def test_a_run_that_a_signal_stopped_goes_on_bit_for_bit(
    tmp_path: Path, hook: str, place: tuple[int, int]
) -> None:
    settings = {**QUIET, "max_epochs": 2, "logger": False}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, more in (("whole", []), ("broken", [Signals(hook, place)])):
        folder = tmp_path / name
        folder.mkdir()
        seed_everything(5)
        saver = ModelCheckpoint(folder / "saved", every_n_epochs=9)
        trainer = Trainer(**settings, callbacks=[Recorder(str(folder)), *more, saver])
        stopped = pytest.raises(Interrupted) if more else nullcontext()
        with stopped:
            trainer.fit(Noisy(), loader(28), loader(16, shuffle=False))
        rows[name] = _events(folder)
    (saved,) = (tmp_path / "broken" / "saved").iterdir()
    again = Trainer(**settings, callbacks=[Recorder(str(tmp_path / "broken"))])
    again.fit(Noisy(), loader(28), loader(16, shuffle=False), ckpt_path=saved)
    kept = {"batch", "validation_end", "epoch_start", "epoch_end"}
    whole, broken = (
        [row for row in found if row["event"] in kept]
        for found in (rows["whole"], _events(tmp_path / "broken"))
    )
    assert broken == whole


def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    """As if it had been asked for them at once."""
    rows = []
    for name, parts in (("whole", [3]), ("parts", [1, 3])):
        folder, resume = tmp_path / name, None
        folder.mkdir()
        seed_everything(5)
        for epochs in parts:
            saver = ModelCheckpoint(folder / "saved")
            callbacks = [Recorder(str(folder)), saver]
            trainer = Trainer(**QUIET, logger=False, max_epochs=epochs, callbacks=callbacks)
            model = Noisy("sgd")
            trainer.fit(model, loader(28), loader(16, shuffle=False), ckpt_path=resume)
            resume = saver.last_model_path
        kept = {"batch", "validation_end", "epoch_start", "epoch_end"}
        rows.append([row for row in _events(folder) if row["event"] in kept])
    # The file was saved at the validation, so the end of the first epoch is done twice.
    assert rows[1].pop(10) == rows[0][9]
    assert rows[1] == rows[0]


# Another number of ranks


class SaveAt(Callback):
    """Saves once, after so many steps."""

    def __init__(self, path: str, step: int) -> None:
        self.path = path
        self.step = step

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Moment) -> None:
        if moment is Moment.STEP and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), (1, 2), pytest.param(4, 2, marks=pytest.mark.slow)],
    ids=["2-to-1", "1-to-2", "4-to-2"],
)
def test_another_number_of_ranks_sees_exactly_what_was_unseen(
    tmp_path: Path, before: int, after: int
) -> None:
    """Inside the second epoch: the rest of its samples, each of them once."""
    path = str(tmp_path / "middle.ckpt")
    step = 48 // (4 * before) + 2
    settings = {**QUIET, "max_epochs": 2, "logger": False, "launcher": "fork"}
    seen: list[set[int]] = []
    for ranks, callback, resume in (
        (before, SaveAt(path, step), None),
        (after, Callback(), path),
    ):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        launcher = "fork" if ranks > 1 else "auto"
        trainer = Trainer(
            **{**settings, "launcher": launcher},
            devices=ranks,
            callbacks=[Recorder(str(folder)), callback],
        )
        trainer.fit(Regression("sgd"), loader(), ckpt_path=resume)
        rows = [row for rank in range(ranks) for row in _events(folder, rank)]
        if resume is None:
            rows = [row for row in rows if row["step"] <= step]
        drawn = [
            number
            for row in rows
            if row["event"] == "batch" and row["epoch"] == 1
            for number in row["samples"]
        ]
        assert len(drawn) == len(set(drawn))
        seen.append(set(drawn))
    assert len(seen[0]) == 2 * 4 * before
    assert seen[0] | seen[1] == set(range(48))
    assert not seen[0] & seen[1]


# Other state, and what does not fit


def test_callbacks_go_on_with_their_state(tmp_path: Path) -> None:
    path = str(tmp_path / "saved.ckpt")
    settings = {**QUIET, "logger": False}
    first = EarlyStopping("val_loss", patience=50, min_delta=100.0)
    trainer = Trainer(**settings, max_epochs=3, callbacks=[first, SaveAt(path, 36)])
    trainer.fit(Regression("sgd"), loader(), loader(16, shuffle=False))
    second = EarlyStopping("val_loss", patience=50, min_delta=100.0)
    again = Trainer(**settings, max_epochs=4, callbacks=[second])
    again.fit(Regression("sgd"), loader(), loader(16, shuffle=False), ckpt_path=path)
    # Saved before the third validation: 1 check without improvement, then two more.
    assert (first.wait_count, second.wait_count) == (2, 3)
    assert second.best_score == first.best_score


def test_a_checkpoint_of_another_model_is_refused_by_the_names_that_miss(tmp_path: Path) -> None:
    path = str(tmp_path / "saved.ckpt")
    settings = {**QUIET, "max_epochs": 1, "logger": False}
    Trainer(**settings, callbacks=[SaveAt(path, 2)]).fit(Regression(), loader())

    class Taller(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(3, 1)

    with pytest.raises(CheckpointError, match=r"extra\.bias.*extra\.weight"):
        Trainer(**settings).fit(Taller(), loader(), ckpt_path=path)
    with pytest.raises(CheckpointError, match=r"net\.0\.weight \(\(16, 8\)"):
        Trainer(**settings).fit(Regression(width=3), loader(), ckpt_path=path)


def test_a_resume_needs_no_seed(tmp_path: Path) -> None:
    """The order of samples comes from the checkpoint."""
    path = str(tmp_path / "saved.ckpt")
    settings = {**QUIET, "max_epochs": 1, "logger": False}
    orders = []
    for name, resume in (("whole", None), ("rest", path)):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(len(orders))
        callbacks = [Recorder(str(folder)), SaveAt(path, 5), At("say", rank=7)]
        Trainer(**settings, callbacks=callbacks).fit(Regression(), loader(), ckpt_path=resume)
        rows = [row for row in _events(folder) if row["event"] == "batch"]
        orders.append([row["samples"] for row in rows])
    assert orders[1] == orders[0][5:]
