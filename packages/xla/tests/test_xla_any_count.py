"""Checkpoints of four devices, of two, of one, and of the CPU backend: each loaded by the others.

Processes of their own, since the number of devices is fixed when the runtime is opened.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

pytestmark = pytest.mark.timeout(600)

#: Arguments: backend, strategy, what to load (or -), what to save; the tensors' bytes are compared.
RUN = """
import sys
import torch
from torch import nn
from drivetrain.runtime import Runtime

backend, strategy, source, target = sys.argv[1:]


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)


def mean_square(module, batch):
    return (module(batch[0]) - batch[1]).square().mean()


def main(runtime):
    torch.manual_seed(0 if source == "-" else 9)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    step, _ = runtime.train_step(module, [optimizer], mean_square)
    batches = [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(3)]
    if source != "-":
        assert runtime.load(source) == {"note": 5}
    else:
        with step:
            for batch in batches:
                step([runtime.feed(batch)])
    runtime.save(target, note=5)
    if source != "-":
        with step:  # what was loaded can be trained on
            assert torch.isfinite(step([runtime.feed(batches[0])]).loss.cpu())


if __name__ == "__main__":
    devices = 1 if backend == "cpu" else -1
    Runtime(accelerator=backend, devices=devices, strategy=strategy).launch(main)
"""

PLACES = {
    "four": ("xla", "fsdp", "4"),
    "four whole": ("xla", "spmd", "4"),
    "two": ("xla", "fsdp", "2"),
    "one": ("xla", "single_device", "1"),
    "cpu": ("cpu", "single_device", "1"),
}


def run(tmp_path, place, source, target):
    backend, strategy, count = PLACES[place]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    done = subprocess.run(
        [sys.executable, str(script), backend, strategy, str(source), str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": count},
    )
    assert not done.returncode, done.stderr[-3000:]
    return tensors(target)


def tensors(path):
    """Every tensor of a checkpoint by name, as the CPU backend reads it."""
    found = {}

    def walk(value, name):
        if hasattr(value, "numpy"):
            found[name] = value.numpy().tobytes()
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                walk(item, f"{name}/{number}")

    walk(DirectoryCheckpointIO().load(str(path)), "")
    assert sum("exp_avg" in name for name in found) == 8
    return found


@pytest.mark.parametrize("first", ["four", "cpu"])
def test_what_one_saved_any_other_loads_and_saves_again_exactly(tmp_path, first):
    saved = run(tmp_path, first, "-", tmp_path / "first")
    places = [place for place in PLACES if place != first]
    for place in places if first == "four" else ("four", "two"):
        again = run(tmp_path, place, tmp_path / "first", tmp_path / place.replace(" ", "-"))
        assert again == saved, place
    back = tmp_path / "back"
    assert run(tmp_path, first, tmp_path / "two", back) == saved
