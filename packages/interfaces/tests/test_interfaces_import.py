"""What importing the contracts costs, measured in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

SPEC_NAMES = "BackendSpec, Capabilities, ContractVersion, DeviceFacts, Feature, Probe, StrategySpec"
BASE = "import dataclasses, typing"


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def _best_ratio(code: str, base: str, rounds: int) -> float:
    """The shortest of several interleaved runs each, so that a busy machine hurts both alike."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for which, source in enumerate((code, base)):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-I", "-c", source], check=True, timeout=60)
            best[which] = min(best[which], time.perf_counter() - started)
    return best[0] / best[1]


@pytest.mark.parametrize(
    "code",
    [
        "import drivetrain_interfaces",
        f"from drivetrain_interfaces import {SPEC_NAMES}",
        "from drivetrain_interfaces import *",
        "from drivetrain_interfaces.discovery import take_inventory",
    ],
)
def test_importing_loads_the_standard_library_only(code: str) -> None:
    foreign = (
        "import sys; before = set(sys.modules)\n"
        f"{code}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'drivetrain_interfaces'}))"
    )
    assert _run(foreign) == "[]"


def test_importing_the_package_loads_none_of_its_modules() -> None:
    assert _run(
        "import sys, drivetrain_interfaces\n"
        "print([name for name in sys.modules if name.startswith('drivetrain_interfaces.')])"
    ) == "[]"  # fmt: skip


@pytest.mark.parametrize(
    ("code", "budget"),
    [
        ("import drivetrain_interfaces", "interfaces"),
        (f"from drivetrain_interfaces import {SPEC_NAMES}", "interfaces_spec"),
    ],
    ids=["package", "spec"],
)
def test_importing_costs_little_more_than_an_interpreter(
    code: str, budget: str, budgets: dict[str, Any]
) -> None:
    most = budgets["imports"][budget]
    ratio = _best_ratio(code, BASE, 5)
    if ratio > most:  # a machine that was busy all that time gets a second, longer chance
        ratio = _best_ratio(code, BASE, 20)
    assert ratio <= most
