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
pytestmark = pytest.mark.timeout(400)


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
            timeout=180,
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
        [sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "on_after_backward" in told["Hook"], done.stderr
    assert "manual" in told["Manual"].lower()
    assert "optimizers" in told["Two"]
    assert "batch_idx" in told["Reads"]


#: What the vendor's program does of its arguments: instances, each with its place in variables.
POPRUN = """#!{python}
import os, subprocess, sys
words = iter(sys.argv[1:])
told = {{}}
for word in words:
    if not word.startswith("--"):
        break
    name, _, value = word.partition("=")
    told[name] = int(value)
instances, total = told["--num-instances"], told["--num-replicas"]
local = total // instances
usual = {{"POPDIST_NUM_TOTAL_REPLICAS": total, "POPDIST_NUM_LOCAL_REPLICAS": local,
         "POPDIST_NUM_IPUS_PER_REPLICA": told["--ipus-per-replica"],
         "OMPI_COMM_WORLD_SIZE": instances, "OMPI_COMM_WORLD_LOCAL_SIZE": instances,
         "PMIX_NAMESPACE": "{namespace}"}}
started = []
for k in range(instances):
    place = {{"POPDIST_REPLICA_INDEX_OFFSET": k * local, "POPDIST_LOCAL_INSTANCE_INDEX": k,
             "OMPI_COMM_WORLD_RANK": k, "OMPI_COMM_WORLD_LOCAL_RANK": k}}
    env = {{**os.environ, **{{n: str(v) for n, v in {{**usual, **place}}.items()}}}}
    started.append(subprocess.Popen([word, *list(words)] if k == 0 else started[0].args, env=env))
raise SystemExit(max(each.wait(170) for each in started))
"""
STARTER = """
import sys
from drivetrain_interfaces import LaunchRequest
from drivetrain_ipu.launcher import PoprunLauncher
sys.argv = sys.argv[1:]
launcher = PoprunLauncher(instances=2)
launcher.launch(print, launcher.plan(LaunchRequest(local_size=int(sys.argv.pop()))))
"""


def test_instances_that_poprun_starts_train_one_model(tmp_path):
    """Started by the launcher, with a stand-in for ``poprun``, against one process on the CPU."""
    program, starter = tmp_path / "poprun", tmp_path / "starter.py"
    program.write_text(POPRUN.format(python=sys.executable, namespace=tmp_path))
    program.chmod(0o755)
    starter.write_text(STARTER)
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FAKE)}
    base["PATH"] = os.pathsep.join([str(tmp_path), base["PATH"]])

    def run(words, accelerator, *more, **options):
        options |= {"shuffle": False, "max_epochs": 1, "enable_checkpointing": False}
        command = [sys.executable, *words, str(SCRIPT), accelerator, json.dumps(options), *more]
        done = subprocess.run(
            command, env=base, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    # Each instance has its share of the batch, which its replicas share.
    found = run([str(starter)], "ipu", "2", batch_size=4, devices=2)
    wanted = run([], "cpu", batch_size=8, devices=1)
    assert found["steps"] == wanted["steps"] == 8
    assert found["total"] == pytest.approx(wanted["total"], rel=1e-5)
