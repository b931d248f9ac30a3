"""Threads per process, memory, and what a user may put into an accelerator object."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from drivetrain_interfaces import Accelerator, SupportsMemoryStats

from drivetrain_cpu import FACTS, cores, spec
from drivetrain_cpu.accelerator import CpuAccelerator, threads_for

MEBI = 2**20


def test_it_is_an_accelerator_with_the_facts_of_the_spec() -> None:
    """A1, A2, A5"""
    accelerator = CpuAccelerator()
    assert isinstance(accelerator, Accelerator)
    assert isinstance(accelerator, SupportsMemoryStats)
    assert accelerator.facts is spec.facts is FACTS
    assert accelerator.device_type == "cpu"
    assert accelerator.device_count() == cores()


def test_a_share_is_the_cores_divided_by_the_processes_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drivetrain_cpu.accelerator.cores", lambda: 8)
    assert [threads_for(size, 8, {}) for size in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]


def test_fewer_threads_that_the_user_asked_torch_for_are_kept() -> None:
    assert threads_for(1, 1, {}) == 1
    assert threads_for(2, 1, {}) == 1


def test_the_users_own_omp_num_threads_wins() -> None:
    """A8"""
    assert threads_for(64, 5, {"OMP_NUM_THREADS": "5"}) == 5


def test_a_process_that_was_forked_after_its_parent_used_threads_does_not_hang() -> None:
    code = (
        "import torch; torch.set_num_threads(2); torch.ones(2000, 2000).sin().sum()\n"
        "from drivetrain_cpu.accelerator import CpuAccelerator\n"
        "from drivetrain_interfaces import LaunchRequest\n"
        "from drivetrain_toolkit.launchers import fork\n"
        "def main(world):\n"
        "    CpuAccelerator().activate(world.local_rank, world.local_size)\n"
        "    return torch.ones(2000, 2000).sum().item(), torch.get_num_threads()\n"
        "launcher = fork()\n"
        "print(launcher.launch(main, launcher.plan(LaunchRequest(local_size=2))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "(4000000.0, 1)", done.stderr


@pytest.mark.parametrize(
    ("omp", "local_size", "expected"),
    [(None, 1, "3 3 3"), (None, 1000, "3 1 3"), ("2", 1000, "2 2 2")],
    ids=["one-process", "many-processes", "user-wins"],
)
def test_activate_sets_the_threads_and_close_restores_them(
    omp: str | None, local_size: int, expected: str
) -> None:
    """A6, A8, A10"""
    code = (
        "import torch; from drivetrain_cpu.accelerator import CpuAccelerator\n"
        f"{'' if omp else 'torch.set_num_threads(3)'}\n"
        "a = CpuAccelerator(); before = torch.get_num_threads()\n"
        f"assert a.activate(0, {local_size}) == torch.device('cpu')\n"
        f"a.activate(0, {local_size})\n"
        "during = torch.get_num_threads(); a.close(); a.close()\n"
        "print(before, during, torch.get_num_threads())"
    )
    dropped = ("OMP_NUM_THREADS", "DRIVETRAIN_LAUNCHED", "MKL_NUM_THREADS")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    if omp:
        env["OMP_NUM_THREADS"] = omp
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env=env,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr


def test_memory_stats_are_bytes_and_see_an_allocation() -> None:
    """A11"""
    accelerator = CpuAccelerator()
    device = torch.device("cpu")
    before = accelerator.memory_stats(device)
    held = torch.ones(64 * MEBI, dtype=torch.uint8)
    after = accelerator.memory_stats(device)
    assert after["allocated"] - before["allocated"] > 32 * MEBI
    assert after["peak"] >= after["allocated"] > held.numel()
    del held


def test_synchronize_returns_at_once() -> None:
    """A9, A10"""
    accelerator = CpuAccelerator()
    accelerator.synchronize(accelerator.activate(0, 1))
    accelerator.close()


def test_plugins_given_by_keyword_are_kept_for_the_trainer() -> None:
    precision, strategy = object(), object()
    accelerator = CpuAccelerator(precision_plugin=precision, training_type_plugin=strategy)  # type: ignore[arg-type]
    assert accelerator.precision_plugin is precision
    assert accelerator.training_type_plugin is strategy
    assert CpuAccelerator().precision_plugin is None
