"""Launchers that a backend brings itself. The shared ones are tested where they are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces import Feature

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support import launching

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain_interfaces import Backend

    from drivetrain_conformance.target import Target

pytestmark = pytest.mark.needs(Feature.SEVERAL_PROCESSES)

SHARED = ("attach", "fork", "script", "spawn")
TIMEOUT_S = 180
#: A launcher has ten seconds to end all ranks; a machine that is busy may take longer.
END_S = 20.0


@pytest.fixture(scope="module")
def own_launchers(device_backend: Backend, target: Target) -> list[str]:
    """Names of the launchers that the backend makes itself, but for those of started ranks."""
    facts = target.spec.facts
    names = {facts.several_devices_launcher, facts.interactive_launcher, *SHARED} - {"attach"}
    own = sorted(name for name in names if device_backend.launcher(name) is not None)
    if not own:
        pytest.skip(f"{BY_DECLARATION}the backend uses the shared launchers")
    return own


def launch(target: Target, launcher: str, folder: Path, *, fails: bool) -> dict[str, Any]:
    """What ``support.launching`` wrote down, with the notes of each rank."""
    folder.mkdir()
    question = {
        "backend": target.backend.entry_point or target.backend.reference,
        "launcher": launcher,
        "folder": str(folder),
        "fails": fails,
        "path": sys.path,
    }
    env = {name: value for name, value in os.environ.items() if name not in launching.VARIABLES}
    done = subprocess.run(  # noqa: S603 - our own interpreter and script
        [sys.executable, launching.__file__, json.dumps(question)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=env,
    )
    ended = time.time()
    path = folder / "answer.json"
    answer: dict[str, Any]
    if path.exists():
        answer = json.loads(path.read_text("utf-8"))
    else:  # a rank 0 that could not be reached was ended, and said why (N8)
        assert fails, f"N5: launch of {launcher!r} returns; it ended with: {done.stderr[-3000:]}"
        assert done.returncode, "N8: a process that was ended because of a failure exits with 1"
        failed = "ProcessFailedError" if "ProcessFailedError" in done.stderr else "nothing"
        answer = {"error": [failed, done.stderr[-3000:]], "ended": ended}
    answer["ranks"] = [
        json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("rank-*.json"))
    ]
    return answer


def test_an_own_launcher_starts_every_rank(
    target: Target, own_launchers: list[str], tmp_path: Path
) -> None:
    """With the place that the plan says, in variables too; rank 0's result comes back.

    R: N2, N3, B16
    """
    for name in own_launchers:
        answer = launch(target, name, tmp_path / name, fails=False)
        assert answer["started by the plan"] == [], f"N2: plan of {name!r} starts nothing"
        ranks = [note["world"] for note in answer["ranks"]]
        assert [world[:2] for world in ranks] == [[0, 2], [1, 2]], (
            f"N2: {name!r} runs main once in each of 2 ranks; it ran in {ranks}"
        )
        assert answer["plan"] == ranks, (
            f"N2: plan lists the world of every process, equal to what it reads: {answer['plan']} "
            f"and {ranks}"
        )
        assert len({note["pid"] for note in answer["ranks"]}) == launching.SIZE, (
            f"N2: {name!r} runs each rank in a process of its own"
        )
        for note in answer["ranks"]:
            rank, size, local_rank, local_size, address, port = note["world"]
            wanted = [rank, size, local_rank, local_size, 0, address, port]
            found = note["environment"]
            assert found == dict(zip(launching.VARIABLES, map(str, wanted), strict=True)), (
                f"N3: each process gets its place in variables; rank {rank} has {found}"
            )
        assert answer["result"] == "from rank 0", f"N2: launch returns rank 0's result; {answer}"


def test_an_own_launcher_ends_all_ranks_when_one_fails(
    target: Target, own_launchers: list[str], tmp_path: Path
) -> None:
    """Soon, and with the first failure's text.

    R: N6, N7, N8
    """
    for name in own_launchers:
        answer = launch(target, name, tmp_path / name, fails=True)
        kind, text = answer.get("error", ["nothing", ""])
        assert kind == "ProcessFailedError", (
            f"N7: launch raises a ProcessFailedError when a rank fails; with {name!r} it raised "
            f"{kind}: {text}"
        )
        assert "the last rank breaks" in text, f"N7: it tells the first failure: {text}"
        seconds = answer["ended"] - max(note["time"] for note in answer["ranks"])
        assert seconds < END_S, (
            f"N6: all processes have ended ten seconds later; it took {seconds:.0f} s"
        )
        alive = [note["pid"] for note in answer["ranks"] if is_alive(note["pid"])]
        assert not alive, f"N6: no process is left; these are: {alive}"


def is_alive(pid: int) -> bool:
    """Whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
