"""Runs of a trainer that Horovod's own launchers start: ``horovodrun``, and ``horovod.run``."""

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


def run(folder, *arguments, before=()):
    """A process that has ended, and all that it printed."""
    done = subprocess.run(
        [*before, sys.executable, SCRIPT, "--strategy=horovod", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    return done, done.stdout + done.stderr


@pytest.fixture(scope="module")
def by_script(tmp_path_factory):
    """Where six steps of two ranks lead that the trainer itself started."""
    folder = tmp_path_factory.mktemp("script")
    done, text = run(folder)
    assert done.returncode == 0, text
    return folder


def assert_same_end(folder, other):
    one, wanted = (torch.load(each / "end.pt", weights_only=True) for each in (folder, other))
    for name, value in wanted.items():
        assert torch.allclose(one[name], value, atol=1e-6, rtol=0), name


def test_ranks_that_horovodrun_started_are_attached_to(tmp_path, by_script):
    horovodrun = Path(sys.executable).with_name("horovodrun")
    done, text = run(tmp_path, "--launcher=attach", before=(horovodrun, "-np", "2", "--gloo"))
    assert done.returncode == 0, text
    assert (tmp_path / "environment.txt").read_text() == "horovod"
    assert_same_end(tmp_path, by_script)


def test_ranks_that_torchrun_started_are_told_who_they_are(tmp_path, by_script):
    """Left alone, Horovod would take each for a world of one there, without a word."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done, text = run(
        tmp_path, "--launcher=attach", before=(*torchrun, "--nproc-per-node=2", "--no-python")
    )
    assert done.returncode == 0, text
    assert (tmp_path / "environment.txt").read_text() == "torchrun"
    assert_same_end(tmp_path, by_script)


def test_horovod_run_starts_the_ranks_of_a_trainer(tmp_path, by_script):
    done, text = run(tmp_path, "--launcher=horovod")
    assert done.returncode == 0, text
    assert_same_end(tmp_path, by_script)


def test_a_rank_that_fails_under_horovod_run_is_named_with_its_error(tmp_path):
    done, text = run(tmp_path, "--launcher=horovod", "--fail-at=3")
    assert done.returncode == 1, text
    assert "ProcessFailedError" in text
    assert "rank 1" in text
    assert "LookupError: lost" in text


def test_a_run_that_was_killed_is_resumed_to_the_same_losses(tmp_path, by_script):
    done, text = run(tmp_path, "--kill-at=5")
    assert done.returncode < 0, text
    assert not (tmp_path / "end.pt").exists()
    done, text = run(tmp_path, "--resume=last")
    assert done.returncode == 0, text
    assert "begins at 4" in text
    losses = (tmp_path / "losses.txt").read_text().splitlines()
    assert [line.split()[0] for line in losses] == ["1", "2", "3", "4", "5", "5", "6"]
    assert losses[4] == losses[5]
    assert losses[:5] + losses[6:] == (by_script / "losses.txt").read_text().splitlines()
    assert_same_end(tmp_path, by_script)
