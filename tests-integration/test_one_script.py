"""The same script, unchanged but for ``accelerator=``, gives the same losses everywhere.

On the CPU, on a simulated IPU and on simulated Gaudi devices, with all optimizer steps, logs and an
evaluation after each epoch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts/one_script.py"
PACKAGES = HERE.parent / "packages"
#: What float32 may differ in after 16 updates: kernels are the same here, their order may not be.
TOLERANCE = 1e-5


def run(accelerator: str, folder: Path, **options: object) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if accelerator != "cpu":
        env["PYTHONPATH"] = str(PACKAGES / accelerator / "tests/fake_sdk")
    env["IPUOF_VIPU_API_PARTITION_ID"] = "simulated"
    env["DRIVETRAIN_FAKE_GAUDI"] = json.dumps({"cards": 2, "locks": str(folder / "locks")})
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), accelerator, json.dumps(options)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(found: dict, wanted: dict) -> None:
    assert found["steps"] == wanted["steps"]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=TOLERANCE)
    assert found["told"] == pytest.approx(wanted["told"], rel=TOLERANCE)
    assert found["total"] == pytest.approx(wanted["total"], rel=TOLERANCE)


@pytest.mark.timeout(700)
def test_one_device_of_each_kind_gives_the_losses_of_the_cpu(tmp_path):
    here = run("cpu", tmp_path, devices=1)
    assert len(here["losses"]) == 16
    for accelerator in ("ipu", "hpu"):
        assert_same(run(accelerator, tmp_path, devices=1), here)
    # Replicas share each batch of one process.
    assert_same(run("ipu", tmp_path, devices=2), here)


@pytest.mark.timeout(700)
def test_two_gaudi_devices_give_the_losses_of_two_processes(tmp_path):
    here = run("cpu", tmp_path, devices=2)
    assert len(here["losses"]) == 8
    assert_same(run("hpu", tmp_path, devices=2), here)
