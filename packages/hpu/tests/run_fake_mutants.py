"""Breaks one rule of the fake Gaudi software at a time, and sees that a test of this package fails.

``run_fake_mutants.py [NAME…]`` runs these, or all of ``fake_mutants.toml``, and prints a line for
each; the exit code is 1 if one was not caught by the test that the table names. Each runs on a copy
of the fake, with that test alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
#: Seconds that one mutant may take.
PATIENCE = 180


def table() -> dict[str, dict[str, Any]]:
    """The mutants by name."""
    text = (HERE / "fake_mutants.toml").read_text(encoding="utf-8")
    return {mutant["name"]: mutant for mutant in tomllib.loads(text)["mutant"]}


def broken(mutant: dict[str, Any], folder: Path) -> Path:
    """A copy of the fake without one rule."""
    copy = folder / str(mutant["name"])
    shutil.copytree(HERE / "fake_sdk", copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / mutant["file"]
    text = path.read_text(encoding="utf-8")
    if text.count(mutant["rule"]) != 1:
        raise SystemExit(f"{mutant['name']}: its rule is {text.count(mutant['rule'])} times there")
    path.write_text(text.replace(mutant["rule"], mutant["broken"]), encoding="utf-8")
    return copy


def caught(mutant: dict[str, Any], folder: Path) -> str:
    """What is wrong about how a mutant was caught; empty if its test failed by an assertion."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"{HERE / mutant['caught_by']}"],
        env={**os.environ, "DRIVETRAIN_FAKE_SDK": str(broken(mutant, folder))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode == 0:
        return f"{mutant['caught_by']} passed"
    if done.returncode != 1 or " error" in done.stdout.splitlines()[-1]:
        return f"pytest ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-500:]}"
    return ""


def main() -> int:
    """Run the mutants that the command line names; returns the exit code."""
    mutants = table()
    names = sys.argv[1:] or list(mutants)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            fault = caught(mutants[name], Path(folder))
            wrong += bool(fault)
            sys.stdout.write(f"{'FAIL' if fault else 'ok  '} {name}: {fault or 'caught'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(names)} were run, {wrong} faults\n")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
