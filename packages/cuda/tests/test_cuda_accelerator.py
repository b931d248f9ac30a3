"""What the accelerator does besides using a device, which runs anywhere."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from drivetrain_interfaces import (
    Accelerator,
    ConfigurationError,
    SupportsMemoryStats,
    SupportsRng,
    UnavailableError,
)

from drivetrain_cuda import FACTS, spec
from drivetrain_cuda.accelerator import CudaAccelerator, read_tf32, write_tf32
from drivetrain_cuda.affinity import cores_near, read_list

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")


def test_it_is_an_accelerator_with_the_facts_of_the_spec() -> None:
    """A1, A2"""
    accelerator: Accelerator = CudaAccelerator()
    statistics: SupportsMemoryStats = CudaAccelerator()
    random: SupportsRng = CudaAccelerator()
    assert isinstance(accelerator, Accelerator)
    assert isinstance(statistics, SupportsMemoryStats)
    assert isinstance(random, SupportsRng)
    assert accelerator.facts is spec.facts is FACTS
    assert accelerator.device_type == "cuda"


def test_it_counts_what_the_probe_found() -> None:
    """A5"""
    assert CudaAccelerator().device_count() == spec.probe().devices


@without_device
def test_activating_without_a_device_says_what_torch_says() -> None:
    """A7"""
    with pytest.raises(UnavailableError, match=r"not compiled with CUDA|NVIDIA driver"):
        CudaAccelerator().activate(0, 1)


def test_closing_twice_and_without_activating_is_harmless() -> None:
    """A10"""
    accelerator = CudaAccelerator()
    accelerator.close()
    accelerator.close()


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_fraction_of_memory_is_a_fraction(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=f"memory_fraction={fraction}"):
        CudaAccelerator(memory_fraction=fraction)


def test_it_pickles_with_its_settings() -> None:
    copy = pickle.loads(pickle.dumps(CudaAccelerator(tf32=True, memory_fraction=0.5)))
    assert (copy.tf32, copy.memory_fraction, copy.bind_cores) == (True, 0.5, False)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Torch's settings, as they were before the test."""
    before = read_tf32()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("setting", [(True, True), (False, False), (False, True), (True, False)])
def test_tf32_settings_are_torchs_own(setting: tuple[bool, bool]) -> None:
    write_tf32(*setting)
    assert read_tf32() == setting
    assert torch.get_float32_matmul_precision() == ("high" if setting[0] else "highest")


def test_a_program_that_sets_it_operation_by_operation_is_not_overruled() -> None:
    """A8; in a process of its own, since torch has no way back."""
    code = (
        "import torch\n"
        "from drivetrain_cuda.accelerator import read_tf32\n"
        "if not hasattr(torch.backends.cudnn.conv, 'fp32_precision'): raise SystemExit\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "try: read_tf32()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.startswith("ConfigurationError CudaAccelerator(tf32=...) was asked for")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5", {5}), ("", set()), ("\n", set())],
)
def test_lists_of_cores_are_read_as_the_kernel_writes_them(text: str, expected: set[int]) -> None:
    assert read_list(text) == expected


def test_cores_near_a_device_are_found_by_its_address(tmp_path: Path) -> None:
    place = tmp_path / "0000:3b:00.0"
    place.mkdir()
    (place / "local_cpulist").write_text("4-5\n")
    assert cores_near("00000000:3B:00.0", tmp_path) == {4, 5}
    assert cores_near("00000000:3C:00.0", tmp_path) == frozenset()
    assert cores_near("", tmp_path) == frozenset()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_of_a_real_device_of_this_machine_are_read() -> None:
    from drivetrain_cuda.affinity import PCI

    places = sorted(PCI.glob("*/local_cpulist")) if PCI.exists() else []
    if not places:
        pytest.skip("the kernel lists no devices on the PCI bus here")
    assert cores_near(f"0000{places[0].parent.name}")


def test_plugins_given_by_keyword_are_kept_for_the_trainer() -> None:
    precision, strategy = object(), object()
    accelerator = CudaAccelerator(precision_plugin=precision, training_type_plugin=strategy)  # type: ignore[arg-type]
    assert accelerator.precision_plugin is precision
    assert accelerator.training_type_plugin is strategy
