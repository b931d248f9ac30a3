"""Ctrl-C and SIGTERM: a clean stop at a step boundary that all ranks agree on, and a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain import Callback, Interrupted, Trainer
from training_parts import Regression, loader

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Running, Starter

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
#: More steps than any test lets it do.
ENDLESS = 1_000_000


def _asked(folder: Path, ranks: int, launcher: str = "auto", **trainer: Any) -> dict[str, Any]:
    settings = {"max_epochs": ENDLESS, "devices": ranks, "launcher": launcher, **trainer}
    return {
        "out": str(folder),
        "model": {"total_steps": ENDLESS},
        "trainer": settings,
        "checkpoint": {"dirpath": str(folder / "saved"), "every_n_epochs": ENDLESS},
        "at": [["say", None, 1, 0]],
    }


def _running(start: Starter, ranks: int, launcher: str = "auto") -> tuple[Running, list[int]]:
    """An endless run in its second epoch, and the process ids of its ranks."""
    running = start("train.py", json.dumps(_asked(start.folder, ranks, launcher)))
    found = {int(rank): int(pid) for _, rank, pid in running.wait_for("here", ranks)}
    return running, [found[rank] for rank in range(ranks)]


def _events(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"events-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _check_stopped(running: Running, ranks: int, code: int) -> int:
    """All ranks stopped after the same step, with a checkpoint of it; returns the step."""
    assert running.finish() == code, running.output
    assert running.left_behind() == []
    assert "Traceback" not in running.errors, running.errors
    steps = []
    for rank in range(ranks):
        events = _events(running.folder, rank)
        names = [event["event"] for event in events]
        assert names[-3:] == ["train_end", "fit_end", "teardown"]
        steps.append(events[-1]["step"])
        assert max(event["step"] for event in events if event["event"] == "batch") == steps[-1]
    assert len(set(steps)) == 1, steps
    (saved,) = (running.folder / "saved").iterdir()
    assert saved.name.endswith(f"step={steps[0]}.ckpt")
    return steps[0]


def _check_goes_on(start: Starter, ranks: int, step: int) -> None:
    """Resume for five steps more: every sample of the epoch is seen exactly once."""
    (saved,) = (start.folder / "saved").iterdir()
    asked = {
        **_asked(start.folder, ranks, "fork" if ranks > 1 else "auto", max_steps=step + 5),
        "resume": str(saved),
        "checkpoint": None,
    }
    start.run("train.py", json.dumps(asked))
    per_epoch = 12 // ranks
    for rank in range(ranks):
        rows = [row for row in _events(start.folder, rank) if row["event"] == "batch"]
        assert [row["step"] for row in rows] == list(range(1, step + 6))
        assert [row["batch_idx"] for row in rows] == [n % per_epoch for n in range(step + 5)]
    drawn = [
        number
        for rank in range(ranks)
        for row in _events(start.folder, rank)
        if row["event"] == "batch" and row["epoch"] == step // per_epoch
        for number in row["samples"]
    ]
    assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize("number", CODES)
def test_one_process_stops_at_a_boundary_and_saves(start: Starter, number: signal.Signals) -> None:
    running, (pid,) = _running(start, 1)
    os.kill(pid, number)
    step = _check_stopped(running, 1, CODES[number])
    if number is signal.SIGTERM:
        _check_goes_on(start, 1, step)


@pytest.mark.parametrize("launcher", ["script", "spawn"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    start: Starter, launcher: str, rank: int
) -> None:
    running, pids = _running(start, 2, launcher)
    os.kill(pids[rank], signal.SIGTERM)
    step = _check_stopped(running, 2, 143)
    if (launcher, rank) == ("script", 1):
        _check_goes_on(start, 2, step)


@pytest.mark.parametrize("launcher", ["script", "spawn"])
def test_a_signal_to_all_processes_stops_them_once(start: Starter, launcher: str) -> None:
    """What a cluster manager does before a time limit: every process gets it."""
    running, pids = _running(start, 2, launcher)
    for pid in {running.process.pid, *pids}:
        os.kill(pid, signal.SIGTERM)
    _check_stopped(running, 2, 143)


def test_control_c_in_a_terminal_stops_all(start: Starter) -> None:
    """It reaches every rank of a script by itself."""
    running, _ = _running(start, 2, "script")
    running.signal_all(signal.SIGINT)
    _check_stopped(running, 2, 130)


def test_a_second_control_c_does_not_wait(start: Starter) -> None:
    asked = {**_asked(start.folder, 1), "at": [["wait", 0, 1, 0]]}
    running = start("train.py", json.dumps(asked))
    ((_, _, pid),) = running.wait_for("here")
    os.kill(int(pid), signal.SIGINT)
    running.wait_for("woke")
    os.kill(int(pid), signal.SIGINT)
    assert running.finish() == -signal.SIGINT, running.output
    assert _events(start.folder, 0)[-1]["event"] == "teardown"


def test_without_a_checkpoint_callback_nothing_is_written(tmp_path: Path) -> None:
    """In this process, whose handlers are put back afterwards."""
    seen: list[str] = []

    class Stops(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 3:
                signal.raise_signal(signal.SIGINT)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            seen.append("train_end")

        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            seen.append("teardown")

    before = [signal.getsignal(number) for number in CODES]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[Stops()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(Interrupted) as caught:
        trainer.fit(Regression("sgd"), loader())
    assert caught.value.code == 130
    assert trainer.interrupted is signal.SIGINT
    assert trainer.global_step == 4
    assert seen == ["train_end", "teardown"]
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(number) for number in CODES] == before
