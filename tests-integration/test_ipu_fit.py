"""The trainer on a simulated IPU: loops, logs, checkpoints, refusals, and a CPU's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[1] / "packages/ipu/tests/fake_sdk"
SCRIPT = Path(__file__).parent / "scripts/one_script.py"


@pytest.fixture
def script(tmp_path):
    """Runs the one script on an accelerator; returns what it said, or its complaint."""

    def run(accelerator, env=None, **options):
        options = {"max_epochs": 2, "default_root_dir": str(tmp_path), **options}
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "error::UserWarning",
                str(SCRIPT),
                accelerator,
                json.dumps(options),
            ],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(FAKE),
                "IPUOF_VIPU_API_PARTITION_ID": "simulated",
                **(env or {}),
            },
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        if done.returncode:
            return done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_resume_goes_on_as_the_whole_run_would_have(script):
    whole = script("ipu", enable_checkpointing=False)
    script("ipu", max_epochs=1)
    rest = script("ipu", resume="last")
    assert rest["losses"] == whole["losses"][8:]
    assert rest["total"] == whole["total"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"strategy": "ddp"}, "ddp"),
        ({"precision": "bf16-mixed"}, "bf16-mixed"),
        ({"devices": [0, 1]}, "number of replicas"),
    ],
    ids=["clip", "strategy", "precision", "devices"],
)
def test_what_a_program_cannot_do_is_refused_by_name(script, options, words):
    told = script("ipu", enable_checkpointing=False, **options)
    assert isinstance(told, str)
    assert words in told


def test_hooks_manual_optimization_and_batch_numbers_are_refused_by_name(tmp_path):
    code = """
import torch
from drivetrain import Trainer
from drivetrain_interfaces import DrivetrainError
from one_script import Net
from torch.utils.data import DataLoader, TensorDataset

class Hook(Net):
    def on_after_backward(self): ...

class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

class Two(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

class Reads(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (batch_idx + 1)

data = DataLoader(TensorDataset(torch.ones(8, 4), torch.ones(8, 1)), batch_size=4)
for kind in (Hook, Manual, Two, Reads):
    trainer = Trainer(accelerator="ipu", max_epochs=1, logger=False, enable_progress_bar=False,
                      enable_checkpointing=False, enable_model_summary=False)
    try:
        trainer.fit(kind(), data)
        print(kind.__name__, "went on")
    except DrivetrainError as error:
        print(kind.__name__, str(error).replace(chr(10), " "))
"""
    path = tmp_path / "refusals.py"
    path.write_text(code)
    paths = os.pathsep.join([str(FAKE), str(SCRIPT.parent)])
    env = {**os.environ, "PYTHONPATH": paths, "IPUOF_VIPU_API_PARTITION_ID": "simulated"}
    done = subprocess.run(
        [sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "on_after_backward" in told["Hook"], done.stderr
    assert "manual" in told["Manual"].lower()
    assert "optimizers" in told["Two"]
    assert "batch_idx" in told["Reads"]


def test_instances_of_poprun_train_one_model(tmp_path):
    """Two real processes with the variables that ``poprun`` sets against one."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FAKE)}

    def start(accelerator, rows, **env):
        options = {"batch_size": rows, "shuffle": False, "max_epochs": 1}
        options = json.dumps({**options, "enable_checkpointing": False})
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), accelerator, options],
            env={**base, **env},
            stdout=subprocess.PIPE,
            text=True,
        )

    told = {"POPDIST_NUM_TOTAL_REPLICAS": "2", "POPDIST_NUM_LOCAL_REPLICAS": "1"}
    told |= {"POPDIST_NUM_IPUS_PER_REPLICA": "1", "PMIX_NAMESPACE": str(tmp_path)}
    places = ("POPDIST_REPLICA_INDEX_OFFSET", "POPDIST_LOCAL_INSTANCE_INDEX")
    ranks = [start("ipu", 4, **told, **dict.fromkeys(places, str(rank))) for rank in range(2)]
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    alone = start("cpu", 8).communicate(timeout=100)[0]
    found, wanted = (json.loads(text.splitlines()[-1]) for text in (outputs[0], alone))
    assert found["steps"] == wanted["steps"] == 8
    assert found["total"] == pytest.approx(wanted["total"], rel=1e-5)
