"""A rank that fails takes the whole run with it: soon, visibly, and leaving no process behind."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain import Trainer
from drivetrain_interfaces import ProcessFailedError
from training_parts import At, Recorder, Regression, loader

if TYPE_CHECKING:
    from conftest import Running, Starter

#: From a failure to the end of the last process, in seconds.
PROMISED = 10.0


def _fail(start: Starter, launcher: str, rank: int, what: str) -> Running:
    """A run in which ``rank`` comes to harm in its second epoch."""
    asked: dict[str, Any] = {
        "out": str(start.folder),
        "at": [[what, rank, 1, 2]],
        "trainer": {"devices": 2, "launcher": launcher, "max_epochs": 1000},
        "model": {"total_steps": 6000},
    }
    running = start("train.py", json.dumps(asked))
    _ends_in_time(running)
    return running


def _ends_in_time(running: Running) -> None:
    running.wait_for("here")
    since = time.monotonic()
    assert running.finish(within=PROMISED) != 0
    assert running.left_behind(within=PROMISED - (time.monotonic() - since)) == []


def _other_tore_down(folder: Path, rank: int) -> bool:
    """Whether user code on the other rank was told, and could clean up."""
    lines = (folder / f"events-{1 - rank}.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["event"] == "teardown"


@pytest.mark.parametrize(
    ("launcher", "rank"), [("script", 0), ("script", 1), ("spawn", 1), ("fork", 0)]
)
def test_an_error_of_one_rank_ends_all_and_is_the_one_shown(
    start: Starter, launcher: str, rank: int
) -> None:
    running = _fail(start, launcher, rank, "raise")
    assert f"LookupError: rank {rank} lost its way" in running.errors
    assert "training_parts.py" in running.errors, "the traceback leads to the user's line"
    # The other rank lost its connection. That is no news, at least not after the reason.
    last = running.errors.rindex("lost its way")
    assert "Traceback" not in running.errors[last:]
    assert _other_tore_down(start.folder, rank)
    if (launcher, rank) != ("script", 0):  # where rank 0's own error simply passes through
        assert (
            f"rank {rank} on {socket.gethostname()!r} at epoch 1, step 8 raised" in running.errors
        )
        assert "waited in backward" in running.errors


@pytest.mark.parametrize(("launcher", "rank"), [("script", 1), ("spawn", 0)])
def test_a_rank_that_was_killed_ends_all_and_is_named(
    start: Starter, launcher: str, rank: int
) -> None:
    running = _fail(start, launcher, rank, "kill")
    assert f"rank {rank} " in running.errors
    last = running.errors.rindex("SIGKILL")
    assert "Traceback" not in running.errors[last:]
    assert _other_tore_down(start.folder, rank)


def test_a_killed_rank_0_takes_along_the_ranks_that_it_started(start: Starter) -> None:
    _fail(start, "script", 0, "kill")


def test_a_rank_that_leaves_in_the_middle_is_a_failure(start: Starter) -> None:
    running = _fail(start, "script", 1, "exit")
    assert "rank 1 " in running.errors
    assert "exit code 3" in running.errors


def test_a_rank_that_never_reaches_the_fit_ends_all(start: Starter) -> None:
    running = start("fail_early.py")
    _ends_in_time(running)
    assert "LookupError: rank 1 has no data" in running.errors


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "reason"), [("raise", "lost its way"), ("kill", "SIGKILL"), ("exit", "exit code 3")]
)
def test_a_forked_run_that_fails_is_an_error_here(
    tmp_path: Path, what: str, reason: str, rank: int
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        launcher="fork",
        max_epochs=1000,
        callbacks=[Recorder(str(tmp_path)), At(what, rank, 1, 2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = set(multiprocessing.active_children())  # ranks that wait for other tests
    since = time.monotonic()
    with pytest.raises(ProcessFailedError, match=f"rank {rank} .*{reason}"):
        trainer.fit(Regression("sgd"), loader())
    assert time.monotonic() - since < PROMISED + 5  # five for the start
    assert set(multiprocessing.active_children()) <= before
    assert _other_tore_down(tmp_path, rank)


class Picky(Regression):
    """Its second rank cannot be set up."""

    def __init__(self, folder: str) -> None:
        super().__init__("sgd")
        self.folder = folder

    def setup(self, stage: str) -> None:
        if self.trainer.world.rank == 1:
            raise LookupError("rank 1 has no data")

    def teardown(self, stage: str) -> None:
        Path(self.folder, f"torn-down-{self.trainer.world.rank}").touch()


def test_an_error_before_training_ends_all_and_tears_down(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        launcher="fork",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ProcessFailedError, match="rank 1 has no data"):
        trainer.fit(Picky(str(tmp_path)), loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torn-down-0", "torn-down-1"]


def test_a_run_after_one_that_failed_is_not_affected(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        launcher="fork",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ProcessFailedError):
        trainer.fit(Picky(str(tmp_path)), loader())
    trainer.fit(Regression("sgd"), loader())
    assert trainer.global_step == 12
