"""The same script, unchanged but for ``accelerator=``, gives the same losses everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts/one_script.py"
FAKE_GAUDI = HERE.parent / "packages/hpu/tests/fake_sdk"
#: What float32 may differ in after 16 updates: kernels are the same here, their order may not be.
TOLERANCE = 1e-5


def run(accelerator: str, devices: int, folder: Path) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if accelerator == "hpu":
        env["PYTHONPATH"] = str(FAKE_GAUDI)
        env["DRIVETRAIN_FAKE_GAUDI"] = json.dumps({"cards": 2, "locks": str(folder / "locks")})
    done = subprocess.run(
        [sys.executable, str(SCRIPT), accelerator, str(devices)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(700)
@pytest.mark.parametrize("devices", [1, 2])
def test_gaudi_gives_the_losses_of_the_cpu(devices, tmp_path):
    here, there = run("cpu", devices, tmp_path), run("hpu", devices, tmp_path)
    assert len(here["losses"]) == 16 // devices
    assert there["losses"] == pytest.approx(here["losses"], rel=TOLERANCE)
    assert there["total"] == pytest.approx(here["total"], rel=TOLERANCE)
