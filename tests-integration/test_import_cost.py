"""What importing the trainer adds to importing torch, which every program here imports anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGETS = tomllib.loads((Path(__file__).parents[1] / "ci/budgets.toml").read_text(encoding="utf-8"))
NAMES = "Callback, DataModule, Module, Runtime, Trainer, seed_everything"


def _seconds(code: str) -> float:
    """Processor time of an interpreter, which other programs on the machine change little."""
    before = os.times()
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=100)
    after = os.times()
    return (
        after.children_user
        + after.children_system
        - (before.children_user + before.children_system)
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "code", ["import drivetrain", f"from drivetrain import {NAMES}"], ids=["package", "names"]
)
def test_importing_the_trainer_costs_little_more_than_torch(code: str) -> None:
    most = BUDGETS["imports"]["trainer"]
    best = [float("inf"), float("inf")]
    for _ in range(12):  # until an undisturbed pair was seen; other programs slow either one
        for which, source in enumerate((code, "import torch")):
            best[which] = min(best[which], _seconds(source))
        if best[0] <= most * best[1]:
            return
    assert best[0] <= most * best[1]
