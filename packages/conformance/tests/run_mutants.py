"""Runs the suite on mutants, many of them from one process: importing torch costs more than a run.

Each mutant runs in a fork of this process, so that what one does is nothing to the next. Prints
what caught each as JSON: ``{name: {"failed": [names], "passed": number, "exit": code}}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: Seconds that one mutant may take, and how many run at the same time.
PATIENCE = 240
JOBS = min(2, os.cpu_count() or 1)


def warm_up() -> None:
    """Import what every run needs, before there are forks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import drivetrain_conformance.fixtures
    import drivetrain_conformance.plugin
    import drivetrain_toolkit.launchers
    import mutant_parts
    import torch.distributed

    assert all(
        (
            drivetrain_conformance.fixtures,
            drivetrain_conformance.plugin,
            drivetrain_toolkit.launchers,
            mutant_parts,
            torch.distributed,
        )
    )


def fork_crews() -> None:
    """Let the suite fork its ranks from this process, where torch is loaded already.

    On real backends they are fresh interpreters, since a device does not survive a fork.
    """
    import multiprocessing

    from drivetrain_conformance.support import crew

    fork = multiprocessing.get_context("fork")
    crew.multiprocessing = SimpleNamespace(get_context=lambda _: fork)  # type: ignore[assignment]


def child(name: str, where: list[str], folder: Path) -> int:
    """Run the suite on one mutant; returns pytest's exit code."""
    import pytest

    fork_crews()
    target = name if ":" in name else f"mutants:{name}"
    modules = [f"drivetrain_conformance.suite.{part}" for part in where]
    return int(
        pytest.main(
            [
                "-q",
                "-p",
                "no:cacheprovider",
                "-c",
                os.devnull,
                f"--rootdir={folder}",
                f"--basetemp={folder / 'tmp'}",
                f"--drivetrain-backend={target}",
                f"--drivetrain-report={folder / 'report.json'}",
                "--pyargs",
                *modules,
            ]
        )
    )


def start(name: str, where: list[str], folder: Path) -> int:
    """Fork; returns the id of the child, which runs one mutant and ends."""
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = child(name, where, folder)
    finally:
        sys.stdout.flush()
        os._exit(code)


def result(folder: Path, status: int) -> dict[str, Any]:
    """What a run found."""
    report = folder / "report.json"
    if not report.exists():
        output = (folder / "output.txt").read_text(errors="replace")
        return {"failed": [], "passed": 0, "exit": status, "output": output[-4000:]}
    tests = json.loads(report.read_text(encoding="utf-8"))["tests"]
    return {
        "failed": sorted(t["name"] for t in tests if t["outcome"] == "failed"),
        "passed": sum(t["outcome"] == "passed" for t in tests),
        "exit": os.waitstatus_to_exitcode(status),
    }


def run(wanted: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Run the mutants, some at a time.

    Args:
        wanted: Which modules of the suite run on each mutant, such as ``["level0"]``.
        folder: Where each may write.
    """
    warm_up()
    waiting = list(wanted)
    running: dict[int, tuple[str, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            name = waiting.pop(0)
            running[start(name, wanted[name], folder / name.replace(":", "-"))] = (
                name,
                time.monotonic(),
            )
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            late = [p for p, (_, began) in running.items() if time.monotonic() - began > PATIENCE]
            for slow in late:
                os.killpg(slow, signal.SIGKILL)
            time.sleep(0.02)
            continue
        name, began = running.pop(pid)
        found[name] = result(folder / name.replace(":", "-"), status)
        found[name]["seconds"] = round(time.monotonic() - began, 1)
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    answer = run(json.loads(sys.argv[1]), Path(sys.argv[2]))
    Path(sys.argv[2], "found.json").write_text(json.dumps(answer), encoding="utf-8")
