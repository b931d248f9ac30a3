"""Simulated devices as an accelerator: which one is current, its memory, its random numbers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnavailableError

from drivetrain_conformance import simulated
from simulated_backend import FACTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import DeviceFacts


class SimulatedAccelerator:
    """The simulated devices of this process."""

    def __init__(self) -> None:
        self._module = simulated.install(FACTS.device_type)
        self._before: int | None = None
        self._threads = torch.get_num_threads()

    @property
    def facts(self) -> DeviceFacts:
        """What simulated devices are like; the same object as in the spec."""
        return FACTS

    @property
    def device_type(self) -> str:
        """Always ``"sim"``."""
        return FACTS.device_type

    def device_count(self) -> int:
        """Devices that were installed."""
        return simulated.current_options().devices

    def activate(self, index: int, local_size: int) -> torch.device:
        """Make device ``index`` current for this process.

        What the devices compute, the host does, so processes on it share its cores; but for the
        user's own ``OMP_NUM_THREADS``.

        Raises:
            UnavailableError: There is no such device.
        """
        there = self.device_count()
        if not 0 <= index < there:
            raise UnavailableError(
                f"Simulated device {index} was asked for; there are {there}.",
                f"Use one from 0 to {there - 1}, or set {simulated.VARIABLE}.",
            )
        if self._before is None:
            self._before = int(self._module.current_device())
            self._threads = torch.get_num_threads()
        self._module.set_device(index)
        if local_size > 1 and not os.environ.get("OMP_NUM_THREADS"):
            share = max(1, (os.cpu_count() or 1) // local_size)
            torch.set_num_threads(min(self._threads, share))
        return torch.device(FACTS.device_type, index)

    def synchronize(self, device: torch.device) -> None:
        """Wait for the device; raises if it has failed."""
        self._module.synchronize(device)

    def close(self) -> None:
        """Make the device current that was so before. Safe to call twice."""
        if self._before is not None:
            self._module.set_device(self._before)
            torch.set_num_threads(self._threads)
            self._before = None

    def memory_stats(self, device: torch.device) -> Mapping[str, float]:
        """Bytes that are allocated on the device, and the most that ever were."""
        allocated, peak = simulated.memory(device.index or 0)
        return {"allocated": float(allocated), "peak": float(peak)}

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """The state of the device's generator, on the host."""
        state: torch.Tensor = self._module.get_rng_state(device)
        return state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore a state."""
        self._module.set_rng_state(state, device)
