"""What the conformance kit can ask where there is no device: level 0."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("drivetrain_conformance", reason="the kit is not installed")

if TYPE_CHECKING:
    from pathlib import Path


def test_level_0_of_the_kit_passes(tmp_path: Path) -> None:
    kit = ["-m", "pytest", "-q", "--pyargs", "drivetrain_conformance.suite"]
    done = subprocess.run(
        [sys.executable, *kit, "--drivetrain-backend=cuda", "--drivetrain-level=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "cuda: passed at level 0" in done.stdout
