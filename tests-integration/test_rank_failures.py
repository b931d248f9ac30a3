"""A rank that fails takes the whole run with it: soon, visibly, and leaving no process behind."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

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
    code = running.finish(within=PROMISED)
    assert running.left_behind(within=PROMISED - (time.monotonic() - since)) == []
    assert code not in (None, 0)


@pytest.mark.parametrize("launcher", ["script", "fork", "spawn"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_all_and_is_the_one_shown(
    start: Starter, launcher: str, rank: int
) -> None:
    running = _fail(start, launcher, rank, "raise")
    message = f"LookupError: 'rank {rank} lost its way'".replace("'", "")
    assert message in running.errors
    # The other rank lost its connection. That is news only after the reason.
    assert "training_parts.py" in running.errors, "the traceback leads to the user's line"
    shown = [line for line in running.errors.splitlines() if line.strip()]
    last = max(n for n, line in enumerate(shown) if "lost its way" in line)
    assert not any(line.startswith("Traceback") for line in shown[last:]), running.errors
    # User code on the other rank was told, and could clean up.
    other = [json.loads(line) for line in (start.folder / f"events-{1 - rank}.jsonl").open()]
    assert other[-1]["event"] == "teardown"


@pytest.mark.parametrize(
    ("launcher", "rank"), [("script", 1), ("fork", 0), ("fork", 1), ("spawn", 1)]
)
def test_a_rank_that_was_killed_ends_all_and_is_named(
    start: Starter, launcher: str, rank: int
) -> None:
    running = _fail(start, launcher, rank, "kill")
    assert f"rank {rank}" in running.errors
    assert "SIGKILL" in running.errors
    first = running.errors.index("SIGKILL")
    assert "Traceback" not in running.errors[first:]


def test_a_killed_rank_0_takes_the_ranks_that_it_started_along(start: Starter) -> None:
    running = start("train.py", json.dumps({
        "out": str(start.folder),
        "at": [["kill", 0, 1, 2]],
        "trainer": {"devices": 2, "launcher": "script", "max_epochs": 1000},
        "model": {"total_steps": 6000},
    }))  # fmt: skip
    _ends_in_time(running)


def test_a_rank_that_leaves_in_the_middle_is_a_failure(start: Starter) -> None:
    running = _fail(start, "script", 1, "exit")
    assert "rank 1" in running.errors
    assert "exit code 3" in running.errors


def test_a_rank_that_never_reaches_the_fit_ends_all(start: Starter) -> None:
    running = start("fail_early.py", "script", "top", str(start.folder))
    _ends_in_time(running)
    assert "LookupError: rank 1 has no data" in running.errors


@pytest.mark.parametrize("launcher", ["script", "fork"])
def test_an_error_before_training_ends_all_and_tears_down(start: Starter, launcher: str) -> None:
    running = start("fail_early.py", launcher, "setup", str(start.folder))
    _ends_in_time(running)
    assert "LookupError: rank 1 has no data" in running.errors
    assert sorted(line for line in running.lines if line.startswith("teardown")) == [
        "teardown 0",
        "teardown 1",
    ]
