"""Turns the rules of the simulated SDK off, one at a time, and sees that tests notice.

``run_rules.py [RULE…]`` runs the tests without these rules, or without each of all, and prints a
line for each with the tests that failed; the exit code is 1 if nothing failed for one.

Importing torch costs more than most runs, so each is a fork of this process.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SUITE = ("test_ipu_simulator.py", "test_ipu_training.py")
#: Seconds that one run may take.
PATIENCE = 120.0
sys.path.insert(0, str(HERE / "fake_sdk"))


def child(rule: str, output: Path) -> int:
    """Run the tests without a rule; returns pytest's exit code."""
    import pytest
    from poptorch import rules

    rules._OFF = rule
    handle = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    files = [str(HERE / name) for name in SUITE]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *files]))


def run(rule: str, folder: Path) -> tuple[int, str]:
    """The exit code without a rule, and the first test that failed."""
    output = folder / f"{rule}.txt"
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            code = child(rule, output)
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # between looks at a child
    text = output.read_text(encoding="utf-8", errors="replace")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    name = failed[0].partition(" - ")[0].rpartition("::")[2] if failed else text[-200:]
    return os.waitstatus_to_exitcode(status), name


def main(asked: list[str]) -> int:
    """Run all that was asked for; 1 if tests did not notice one."""
    import pytest
    import torch
    from poptorch.rules import RULES

    torch.set_num_threads(1)
    assert pytest
    unknown = sorted(set(asked) - RULES)
    if unknown:
        print(f"no such rules: {unknown}; there are {sorted(RULES)}")
        return 2
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        for rule in asked or sorted(RULES):
            code, first = run(rule, Path(folder))
            print(f"{'caught ' if code == 1 else 'MISSED '} {rule:26} {first}", flush=True)
            unnoticed += [] if code == 1 else [rule]
    print(f"{len(asked or RULES)} rules, {len(unnoticed)} that no test misses: {unnoticed}")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
