"""Runs of a trainer on two real ranks: killed and resumed, and loaded by other strategies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "tests-integration/scripts/engine_train.py"
PATIENCE = 400.0

pytestmark = pytest.mark.timeout(900)


def run(folder, *arguments):
    """A process that has ended, and all that it printed."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    return done, done.stdout + done.stderr


def kept(folder, name):
    return torch.load(folder / name, weights_only=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Six steps of two ranks at stage 3 with all parameters divided."""
    folder = tmp_path_factory.mktemp("run")
    done, text = run(folder, "--strategy=all-divided")
    assert done.returncode == 0, text
    return folder


def assert_same_state(one, other):
    assert one["module"].keys() == other["module"].keys()
    for name, value in other["module"].items():
        assert torch.equal(one["module"][name], value), name
    for mine, theirs in zip(one["optimizers"], other["optimizers"], strict=True):
        assert mine["state"].keys() == theirs["state"].keys()
        for name, entry in theirs["state"].items():
            for key, value in entry.items():
                assert torch.equal(mine["state"][name][key], value), (name, key)


def test_a_run_that_was_killed_is_resumed_to_the_same_losses(tmp_path, undisturbed):
    done, text = run(tmp_path, "--strategy=all-divided", "--kill-at=5")
    assert done.returncode < 0, text
    done, text = run(tmp_path, "--strategy=all-divided", "--resume=last")
    assert done.returncode == 0, text
    assert "begins at 4" in text
    losses = (tmp_path / "losses.txt").read_text().splitlines()
    assert [line.split()[0] for line in losses] == ["1", "2", "3", "4", "5", "5", "6"]
    assert losses[4] == losses[5]
    assert losses[:5] + losses[6:] == (undisturbed / "losses.txt").read_text().splitlines()
    assert_same_state(kept(tmp_path, "left.pt"), kept(undisturbed, "left.pt"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--strategy=single_device", "--devices=1"),
        ("--strategy=fsdp",),
        ("--strategy=deepspeed_stage_1",),
    ],
    ids=lambda words: words[0].partition("=")[2],
)
def test_a_checkpoint_of_stage_three_is_loaded_by_others(tmp_path, undisturbed, arguments):
    (saved,) = (undisturbed / "checkpoints").glob("*step=6*")
    done, text = run(tmp_path, *arguments, "--steps=7", f"--resume={saved}")
    assert done.returncode == 0, text
    assert "begins at 6" in text
    assert_same_state(kept(tmp_path, "loaded.pt"), kept(undisturbed, "left.pt"))


def test_a_rank_that_fails_is_named_with_its_error(tmp_path):
    done, text = run(tmp_path, "--strategy=deepspeed_stage_2", "--fail-at=3")
    assert done.returncode == 1, text
    assert "rank 1" in text
    assert "LookupError: lost" in text
