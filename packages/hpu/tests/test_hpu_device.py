"""Opening a device, its memory and its random numbers, on the simulated one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import UnavailableError

from drivetrain_hpu.accelerator import HpuAccelerator
from drivetrain_hpu.bridge import device_module

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.timeout(400)
FIRST_USE = """
import os, sys
from drivetrain_hpu.bridge import load_bridge
load_bridge()
import torch, fake_gaudi
for call in ("torch.hpu.is_available()", "torch.hpu.device_count()", "torch.hpu.is_initialized()",
             "torch.manual_seed(1)", "torch.hpu.get_rng_state(0)", "torch.hpu.get_rng_state_all()"):
    eval(call)
    assert fake_gaudi.Held.module is None, call
for call in ("torch.ones(1, device='hpu')", "torch.hpu.get_rng_state()",
             "torch.hpu.memory_allocated()"):
    child = os.fork()  # a module is kept to the end of a process
    if child:
        assert os.waitpid(child, 0)[1] == 0, call
        continue
    eval(call)
    held = fake_gaudi.Held.module
    eval(call)
    os._exit(0 if held == "3" and len(fake_gaudi.Held.calls) == 1 else 1)
"""


def test_a_module_is_opened_by_first_use_only(run_python: Run) -> None:
    run_python(FIRST_USE)


@pytest.mark.parametrize(
    "call",
    [
        "current_device",
        "synchronize",
        "get_device_name",
        "get_device_properties",
        "get_device_capability",
        "memory_stats",
        "mem_get_info",
        "current_stream",
    ],
)
def test_these_calls_open_the_device(
    monkeypatch: pytest.MonkeyPatch, call: str, device: torch.device
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(device_module(), "_open", opened.append)
    getattr(device_module(), call)()
    assert opened


BUSY = """
import subprocess, sys
from drivetrain_hpu.accelerator import HpuAccelerator
from drivetrain_interfaces import UnavailableError
accelerator = HpuAccelerator()
if len(sys.argv) > 1:
    try:
        accelerator.activate(1, 2)
    except UnavailableError as error:
        print(error)
    sys.exit(0)
assert str(accelerator.activate(1, 2)) == "hpu:0"
assert str(accelerator.activate(1, 2)) == "hpu:0"
again = subprocess.run([sys.executable, __file__, "again"], capture_output=True, text=True,
                       timeout=60, check=True)
print(again.stdout)
"""


def test_a_second_process_on_the_same_module_is_told_that_it_is_busy(run_python: Run) -> None:
    told = run_python(BUSY).stdout
    assert "was to open module 1" in told
    assert "hl-smi" in told


def test_the_device_has_index_0_whatever_the_module(device: torch.device) -> None:
    assert device == torch.device("hpu", 0)
    assert torch.ones(2, device="hpu").device == device
    assert torch.accelerator.current_accelerator() == torch.device("hpu")


def test_a_module_that_is_not_there_is_refused(device: torch.device) -> None:
    with pytest.raises(UnavailableError, match="Gaudi device 9 was asked for, and this process"):
        HpuAccelerator().activate(9, 1)


def test_memory_is_told_by_the_vendors_keys(device: torch.device, record: dict[str, Any]) -> None:
    assert list(device_module().memory_stats()) == record["memory_stats"]
    accelerator = HpuAccelerator()
    before = accelerator.memory_stats(device)
    held = torch.zeros(1_000_000, device=device)
    after = accelerator.memory_stats(device)
    assert after["allocated"] - before["allocated"] == held.nbytes
    assert after["peak"] >= after["allocated"]
    assert after["reserved"] == after["total"] == device_module().memory_reserved()
    assert device_module().mem_get_info() == (after["total"] - after["allocated"], after["total"])


def test_there_is_no_cache_to_empty_and_torchs_own_memory_functions_fail(
    device: torch.device,
) -> None:
    assert not hasattr(device_module(), "empty_cache")
    for name in ("empty_cache", "memory_stats"):
        with pytest.raises(RuntimeError, match="not a DeviceAllocator"):
            getattr(torch.accelerator, name)()


def test_random_numbers_are_one_generator_of_index_0(device: torch.device) -> None:
    accelerator = HpuAccelerator()
    torch.manual_seed(3)
    state = accelerator.rng_state(device)
    first = torch.rand(4, device=device)
    accelerator.set_rng_state(state, device)
    assert torch.rand(4, device=device).equal(first)
    torch.manual_seed(3)
    assert torch.rand(4, device=device).equal(first)  # the patched seed reaches the device
    with pytest.raises(RuntimeError, match="Only device 0"):
        device_module().get_rng_state(1)
    with pytest.raises(RuntimeError, match="list of one"):
        device_module().set_rng_state_all([state, state])
    assert len(device_module().get_rng_state_all()) == 1


def test_forks_of_random_state_are_for_this_device(device: torch.device) -> None:
    torch.manual_seed(5)
    with torch.random.fork_rng([0]):
        inside = torch.rand(2, device=device)
    assert torch.rand(2, device=device).equal(inside)


def test_determinism_is_passed_on_and_set_back(device: torch.device) -> None:
    accelerator = HpuAccelerator()
    torch.use_deterministic_algorithms(True)
    try:
        accelerator.activate(0, 1)
        assert device_module().getDeterministic()
    finally:
        torch.use_deterministic_algorithms(False)
    accelerator.close()
    assert not device_module().getDeterministic()


def test_devices_of_the_first_generation_answer_by_name(
    device: torch.device, gaudi: Callable[..., None]
) -> None:
    gaudi(generation="GAUDI")
    assert device_module().get_device_name() == "GAUDI"
    from habana_frameworks.torch.utils import experimental

    assert not experimental._is_fp16_supported()
