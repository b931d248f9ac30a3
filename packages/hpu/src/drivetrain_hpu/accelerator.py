"""Gaudi devices as an accelerator: one for each process, opened once and for good."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import UnavailableError
from drivetrain_toolkit.threads import share_of_threads

from drivetrain_hpu import FACTS
from drivetrain_hpu.bridge import described, device_module, is_loaded, is_open, load_bridge
from drivetrain_hpu.modules import MODULE, choose_module
from drivetrain_hpu.probing import probe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import DeviceFacts, Precision, StrategyFactory

#: What torch calls the device of a process, whichever module it is.
DEVICE = torch.device(FACTS.device_type, 0)


class HpuAccelerator:
    """The Gaudi modules of one machine, of which each process opens one.

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
        self._deterministic_before: bool | None = None
        self._threads_before: int | None = None

    @property
    def facts(self) -> DeviceFacts:
        """What Gaudi devices are like; the same object as in the spec."""
        return FACTS

    @property
    def device_type(self) -> str:
        """Always ``"hpu"``."""
        return FACTS.device_type

    def device_count(self) -> int:
        """Modules that this process sees. Opens none."""
        return probe(os.environ).devices

    def activate(self, index: int, local_size: int) -> torch.device:
        """Open the module of that index among the visible ones; returns ``hpu:0``.

        A process opens one module and keeps it to its end, so a second call changes nothing.

        Raises:
            UnavailableError: There is no such module, another process holds it, or the bridge does
                not import.
        """
        load_bridge()
        hpu = device_module()
        there = int(hpu.device_count()) if hpu.is_available() else 0
        if not 0 <= index < there:
            raise UnavailableError(
                f"Gaudi device {index} was asked for, and this process sees {there}.",
                f"Use one from 0 to {there - 1}, or change HABANA_VISIBLE_MODULES."
                if there
                else "Run 'drivetrain doctor' to see why.",
            )
        if not is_open():
            choose_module(index, local_size, there)
            self._open(hpu)
        self._share_threads(local_size)
        if torch.are_deterministic_algorithms_enabled() and self._deterministic_before is None:
            self._deterministic_before = bool(hpu.getDeterministic())
            hpu.setDeterministic(True)
        return DEVICE

    def synchronize(self, device: torch.device) -> None:
        """Wait for the device."""
        device_module().synchronize()

    def close(self) -> None:
        """Set back what ``activate`` changed; the device stays open until the process ends."""
        if self._deterministic_before is not None:
            device_module().setDeterministic(self._deterministic_before)
            self._deterministic_before = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def memory_stats(self, device: torch.device) -> Mapping[str, float]:
        """Bytes: in tensors (``allocated``), the most of it (``peak``), and on the device."""
        found = device_module().memory_stats()
        return {
            "allocated": float(found["InUse"]),
            "peak": float(found["MaxInUse"]),
            "reserved": float(found["Limit"]),
            "total": float(found["Limit"]),
        }

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """The state of the device's generator, on the host."""
        state: torch.Tensor = device_module().get_rng_state_all()[0]
        return state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore a state."""
        device_module().set_rng_state_all([state])

    def compilations(self) -> Mapping[str, float]:
        """What the bridge counted of compiled graphs. After the first steps it should not grow.

        Raises:
            UnavailableError: No device was activated yet.
        """
        if not is_loaded():
            raise UnavailableError(
                "Compiled graphs were to be counted before the Gaudi bridge was loaded.",
                "Ask after the first step.",
            )
        metric = device_module().metric_global("graph_compilation")
        return {str(label): float(count) for label, count in metric.stats()}

    def _open(self, hpu: Any) -> None:
        module = os.environ.get(MODULE)
        try:
            hpu.current_device()
        except RuntimeError as error:
            which = f"module {module}" if module else "any module"
            raise UnavailableError(
                f"This process was to open {which} of the Gaudi devices, and {described(error)}.",
                "Look with hl-smi for a process that holds it: a module serves one process at a "
                "time. End that one, or choose others by HABANA_VISIBLE_MODULES.",
            ) from error

    def _share_threads(self, local_size: int) -> None:
        """Processes of one machine share its cores, but for the user's own word."""
        now = torch.get_num_threads()
        share = share_of_threads(local_size, now, os.environ, os.cpu_count() or 1)
        if share == now:
            return
        if self._threads_before is None:
            self._threads_before = now
        torch.set_num_threads(share)
