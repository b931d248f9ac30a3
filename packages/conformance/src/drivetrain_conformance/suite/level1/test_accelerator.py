"""One family of devices: counted, made current, released."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from drivetrain_interfaces import SupportsMemoryStats, SupportsRng, UnavailableError

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.messages import refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain_interfaces import Accelerator, BackendSpec, Probe


def test_it_counts_what_the_probe_found(accelerator: Accelerator, found_devices: Probe) -> None:
    """A plan was made from the probe.

    R: A5, B10
    """
    assert accelerator.device_count() == found_devices.devices, (
        f"A5: device_count() agrees with the probe, which found {found_devices.devices}; it says "
        f"{accelerator.device_count()}"
    )


def test_activate_returns_the_device(accelerator: Accelerator, spec: BackendSpec) -> None:
    """And work can be done on it.

    R: A2, A6, A9
    """
    device = accelerator.activate(0, 1)
    assert isinstance(device, torch.device), f"A6: activate returns a torch.device, not {device!r}"
    assert device.type == spec.facts.device_type, (
        f"A2: device_type is the type that torch.device takes; activate gave {device} where facts "
        f"say {spec.facts.device_type!r}"
    )
    if spec.facts.indexed:
        assert device.index == 0, f"A6: activate(0, 1) returns the device of that index: {device}"
    value = torch.ones(3).to(device) * 2
    accelerator.synchronize(device)
    assert value.cpu().tolist() == [2.0, 2.0, 2.0], "A9: work is finished after synchronize"


def test_every_device_can_be_activated(
    accelerator: Accelerator, spec: BackendSpec, found_devices: Probe
) -> None:
    """The index is that of the plan.

    R: A6
    """
    if not spec.facts.indexed:
        pytest.skip(f"{BY_DECLARATION}these devices have no index")
    for index in reversed(range(min(found_devices.devices, 8))):
        device = accelerator.activate(index, 1)
        assert device.index == index, (
            f"A6: activate makes device {index} current and returns it; it returned {device}"
        )
        there = torch.zeros(1, device=spec.facts.device_type).device
        assert there.index == index, (
            f"A6: activate makes device {index} current; a new tensor is on {there}"
        )


def test_a_device_that_is_not_there_is_refused(
    accelerator: Accelerator, spec: BackendSpec, found_devices: Probe
) -> None:
    """With its index, and what is there.

    R: A7
    """
    if not spec.facts.indexed:
        pytest.skip(f"{BY_DECLARATION}these devices have no index")
    absent = found_devices.devices + 5
    rule = f"A7: activating device {absent} of {found_devices.devices} is an UnavailableError"
    with refused(UnavailableError, naming=str(absent), rule=rule) as caught:
        accelerator.activate(absent, 1)
    assert str(found_devices.devices) in str(caught.value), (
        f"A7: the refusal says what is there, {found_devices.devices}: {caught.value}"
    )


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A number of threads that an accelerator may want to change."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_users_number_of_threads_wins(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user set for this process is not chosen again.

    R: A8
    """
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    accelerator.activate(0, 1 + (os.cpu_count() or 1))
    assert torch.get_num_threads() == before, (
        f"A8: OMP_NUM_THREADS={before} wins over what activate would choose; it chose "
        f"{torch.get_num_threads()}"
    )


@pytest.mark.usefixtures("two_threads")
def test_closing_restores_what_activate_changed(accelerator: Accelerator) -> None:
    """The process goes on after the run.

    R: A10
    """
    # With two sizes, so that something that was left behind before is seen to change.
    for local_size in (1 + (os.cpu_count() or 1), 2 + (os.cpu_count() or 1)):
        threads, environment = torch.get_num_threads(), dict(os.environ)
        accelerator.activate(0, local_size)
        accelerator.close()
        assert torch.get_num_threads() == threads, "A10: close restores the number of threads"
        assert dict(os.environ) == environment, "A10: close restores environment variables"


def test_closing_twice_is_harmless(accelerator: Accelerator) -> None:
    """So is closing what was never activated.

    R: A10
    """
    accelerator.close()
    accelerator.activate(0, 1)
    accelerator.close()
    accelerator.close()


def test_memory_is_told_in_bytes(accelerator: Accelerator) -> None:
    """At least what is allocated, and the peak.

    R: A11
    """
    if not isinstance(accelerator, SupportsMemoryStats):
        pytest.skip(f"{BY_DECLARATION}the accelerator has no memory_stats")
    device = accelerator.activate(0, 1)
    held = torch.ones(1024, device=device)
    stats = accelerator.memory_stats(device)
    assert {"allocated", "peak"} <= set(stats), (
        f"A11: memory_stats has at least allocated and peak; it has {sorted(stats)}"
    )
    assert stats["peak"] >= stats["allocated"] >= held.nbytes, (
        f"A11: memory_stats counts bytes, and a peak is the most that was allocated; with a tensor "
        f"of {held.nbytes} bytes it says {dict(stats)}"
    )


def test_random_numbers_can_be_drawn_again(accelerator: Accelerator) -> None:
    """A run that is resumed draws what it would have drawn.

    R: A12
    """
    if not isinstance(accelerator, SupportsRng):
        pytest.skip(f"{BY_DECLARATION}the accelerator has no generator of its own")
    device = accelerator.activate(0, 1)
    state = accelerator.rng_state(device)
    assert state.dtype is torch.uint8, f"A12: rng_state is a uint8 tensor, not {state.dtype}"
    assert state.device.type == "cpu", f"A12: rng_state is on the host, not on {state.device}"
    first = torch.rand(16, device=device).cpu()
    second = torch.rand(16, device=device).cpu()
    accelerator.set_rng_state(state, device)
    again = torch.rand(16, device=device).cpu()
    assert torch.equal(again, first), "A12: set_rng_state makes the device draw the same again"
    assert not torch.equal(second, first), "A12: the device draws other numbers each time"
