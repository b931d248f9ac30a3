"""Runs the suite on mutants and compares what failed with ``mutants.toml``.

``run_mutants.py [NAME…]`` runs these, or all, and prints a line for each; the exit code is 1 if
one was not caught by exactly the tests that the table lists. ``--json FILE`` also writes what was
found; ``--write`` puts it into the table, for a person to judge by its diff.

Importing torch costs more than most runs, so each mutant runs in a fork of this process, and what
one does is nothing to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
#: Seconds that one mutant may take, and how many run at the same time.
PATIENCE = 300
JOBS = min(2, os.cpu_count() or 1)


def table() -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """The modules of each group, and the mutants by name."""
    content = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))
    return content["groups"], {mutant["name"]: mutant for mutant in content["mutant"]}


def warm_up() -> None:
    """Import what every run needs, before there are forks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import drivetrain_toolkit.launchers
    import mutant_parts
    import torch

    import drivetrain_conformance.fixtures
    import drivetrain_conformance.plugin

    mutant_parts.backend("good")
    # The first step of an optimizer imports half a second of torch. No backward: it starts threads.
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.SGD([parameter], lr=0.1).step()
    torch.optim.Adam([parameter], lr=0.1).step()
    assert drivetrain_conformance.fixtures
    assert drivetrain_conformance.plugin
    assert drivetrain_toolkit.launchers


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
    target = name if ":" in name or name.startswith("installed") else f"mutants:{name}"
    code = pytest.main(
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
            *(f"drivetrain_conformance.suite.{part}" for part in where),
        ]
    )
    return int(code)


def start(name: str, where: list[str], folder: Path) -> int:
    """Fork; returns the id of the child, which runs one mutant and ends."""
    folder.mkdir(parents=True)
    sys.stdout.flush()
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
    """What a run found: the functions that failed, and how many tests passed."""
    report = folder / "report.json"
    if not report.exists():
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        return {"failed": [], "passed": 0, "broke": f"exit {status}: {output[-4000:]}"}
    tests = json.loads(report.read_text(encoding="utf-8"))["tests"]
    failed = [t["name"].partition("[")[0] for t in tests if t["outcome"] == "failed"]
    return {
        "failed": sorted(set(failed)),
        "passed": sum(t["outcome"] == "passed" for t in tests),
        "broke": "",
    }


def run(wanted: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Run mutants, some at a time.

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
            pid = start(name, wanted[name], folder / name.replace(":", "-"))
            running[pid] = (name, time.monotonic())
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            for slow, (_, began) in running.items():
                if time.monotonic() - began > PATIENCE:
                    os.killpg(slow, signal.SIGKILL)
            time.sleep(0.02)  # between looks at children
            continue
        name, began = running.pop(pid)
        found[name] = result(folder / name.replace(":", "-"), status)
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        shutil.rmtree(folder / name.replace(":", "-"), ignore_errors=True)
    return found


def verdict(mutant: dict[str, Any], found: dict[str, Any]) -> str:
    """What is wrong about how a mutant was caught; empty if nothing is."""
    if found["broke"]:
        return f"the suite itself broke: {found['broke']}"
    failed, listed = set(found["failed"]), set(mutant["caught_by"])
    lacking = sorted(listed - failed)
    more = sorted(failed - listed - set(mutant.get("perhaps", ())))
    return "; ".join(
        text
        for text in (
            f"not caught by {', '.join(lacking)}" if lacking else "",
            f"also caught by {', '.join(more)}" if more else "",
        )
        if text
    )


def write(found: dict[str, dict[str, Any]], mutants: dict[str, dict[str, Any]]) -> None:
    """Put what was found into the table, but for tests that a mutant may or may not fail."""
    path = HERE / "mutants.toml"
    text = path.read_text(encoding="utf-8")
    for name, told in found.items():
        failed = sorted(set(told["failed"]) - set(mutants.get(name, {}).get("perhaps", ())))
        if not failed:
            continue
        lines = [f'  "{test}",\n' for test in failed]
        listed = f'["{failed[0]}"]' if len(lines) == 1 else f"[\n{''.join(lines)}]"
        entry = rf'(?<=^name = "{re.escape(name)}"\n)(.*?^caught_by = )\[.*?\]$'
        text = re.sub(entry, rf"\1{listed}", text, count=1, flags=re.MULTILINE | re.DOTALL)
    path.write_text(text, encoding="utf-8")


def unlisted(names: set[str]) -> list[str]:
    """Mutants that are made somewhere and are not in the table, or the other way round."""
    import mutant_parts
    import mutants

    made = {name for name in mutant_parts.BACKENDS if name.islower()} | set(mutants.CHANGES)
    return sorted(
        (made - {"good"})
        ^ {name for name in names if ":" not in name and not name.startswith("installed")}
    )


def main() -> int:
    """Run the mutants that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants; by default all")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--write", action="store_true", help="put what was found into the table")
    options = parser.parse_args()
    groups, mutants = table()
    names = options.names or ["good", *mutants]
    everything = sorted({module for modules in groups.values() for module in modules})
    wanted = {n: groups[mutants[n]["group"]] if n in mutants else everything for n in names}
    with tempfile.TemporaryDirectory() as folder:
        found = run(wanted, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found), encoding="utf-8")
    if options.write:
        write(found, mutants)
        groups, mutants = table()
    wrong = 0
    for name in unlisted(set(mutants)):
        wrong += 1
        sys.stdout.write(f"FAIL {name}: it is not both made and listed\n")
    good = {"caught_by": ()}
    for name in names:
        fault = verdict(mutants.get(name, good), found[name])
        wrong += bool(fault)
        count = len(found[name]["failed"])
        told = fault or (f"caught by {count} of the suite's tests" if name in mutants else "passes")
        sys.stdout.write(f"{'FAIL' if fault else 'ok  '} {name}: {told}\n")
    sys.stdout.write(f"{len(names)} were run, {wrong} faults\n")
    return bool(wrong)


if __name__ == "__main__":
    # The folder "installed" holds metadata alone, as if pip had put it there.
    paths = [str(HERE), str(HERE / "installed")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    raise SystemExit(main())
