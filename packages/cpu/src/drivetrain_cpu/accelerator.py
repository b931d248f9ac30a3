"""The CPU as an accelerator: how many threads a process gets, and how much memory it uses."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from drivetrain_toolkit.threads import share_of_threads

from drivetrain_cpu import FACTS, cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import DeviceFacts, Precision, StrategyFactory

_STATM = Path("/proc/self/statm")


class CpuAccelerator:
    """The CPU cores of one machine, shared by the processes that run on it.

    Args:
        precision_plugin: The precision for runs on this accelerator, when it is given to a trainer
            as an object. None leaves the choice to the trainer.
        training_type_plugin: The same for the strategy.
    """

    def __init__(
        self,
        precision_plugin: Precision | None = None,
        training_type_plugin: StrategyFactory | None = None,
    ) -> None:
        self.precision_plugin = precision_plugin
        self.training_type_plugin = training_type_plugin
        self._threads_before: int | None = None

    @property
    def facts(self) -> DeviceFacts:
        """What CPUs are like; the same object as in the spec."""
        return FACTS

    @property
    def device_type(self) -> str:
        """Always ``"cpu"``."""
        return FACTS.device_type

    def device_count(self) -> int:
        """Cores that this process may run on."""
        return cores()

    def activate(self, index: int, local_size: int) -> torch.device:
        """Give this process its share of the cores as torch threads; returns the CPU device."""
        before = torch.get_num_threads()
        threads = threads_for(local_size, before, os.environ)
        if threads != before:
            torch.set_num_threads(threads)
            if self._threads_before is None:
                self._threads_before = before
        return torch.device(FACTS.device_type)

    def synchronize(self, device: torch.device) -> None:
        """Return at once: work on a CPU is finished when the call that did it returns."""

    def close(self) -> None:
        """Set torch's threads back to what they were. Safe to call twice."""
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def memory_stats(self, device: torch.device) -> Mapping[str, float]:
        """Bytes that this process holds in memory (``allocated``) and held at most (``peak``)."""
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        if sys.platform != "darwin":  # where it is in bytes already
            peak *= 1024
        allocated = _resident()
        if allocated is None:
            return {"allocated": peak, "peak": peak}
        return {"allocated": allocated, "peak": max(peak, allocated)}


def threads_for(local_size: int, current: int, env: Mapping[str, str]) -> int:
    """Torch threads for one of ``local_size`` processes: its share of the cores that it may use.

    Args:
        local_size: Processes of the run on this machine.
        current: Threads that torch would use now.
        env: The environment of this process.
    """
    return share_of_threads(local_size, current, env, cores())


def _resident() -> float | None:
    if not _STATM.exists():
        return None
    pages = int(_STATM.read_text(encoding="ascii").split()[1])
    return float(pages * resource.getpagesize())
