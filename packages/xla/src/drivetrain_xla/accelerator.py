"""XLA devices as an accelerator."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnavailableError

from drivetrain_xla import FACTS, device_module
from drivetrain_xla.probing import look
from drivetrain_xla.runtime import (
    has_its_own_chip,
    is_open,
    load_library,
    open_runtime,
)

if TYPE_CHECKING:
    from drivetrain_interfaces import DeviceFacts, Precision, StrategyFactory


class XlaAccelerator:
    """TPU devices of one machine, or, if the user asked for it, CPUs behind the same runtime.

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

    @property
    def facts(self) -> DeviceFacts:
        """What XLA devices are like; the same object as in the spec."""
        return FACTS

    @property
    def device_type(self) -> str:
        """Always ``"xla"``."""
        return FACTS.device_type

    def device_count(self) -> int:
        """Devices that the probe finds. Does not open the runtime."""
        return look(os.environ).devices

    def activate(self, index: int, local_size: int) -> torch.device:
        """Make device ``index`` current. Device 0 is so without opening anything.

        So a strategy may still say how the devices are opened: one by one, or all as one.

        One of several processes of a machine sees its own chip only.

        Raises:
            UnavailableError: There is no such device, or the runtime does not open.
        """
        if local_size > 1 and has_its_own_chip(index, local_size):
            index = 0
        found = look(os.environ)
        if index >= found.devices:
            why = f" ({found.reason})" if found.reason else ""
            raise UnavailableError(
                f"XLA device {index} was asked for, and this machine has {found.devices}{why}.",
                f"Use an index below {found.devices}." if found.devices else "Mend that.",
            )
        load_library()
        if not index and not is_open():
            return torch.device(FACTS.device_type, 0)
        open_runtime()
        import torch_xla

        if index >= len(torch_xla.devices()):
            raise UnavailableError(
                f"XLA device {index} was asked for in a process that trained with several devices "
                "as one (SPMD) before, which torch_xla cannot undo.",
                "Use device 0 or all devices here, or another process.",
            )
        device: torch.device = torch_xla.device(index)
        return device

    def synchronize(self, device: torch.device) -> None:
        """Compute what was traced, and return once it and all other work has finished."""
        open_runtime()
        device_module.synchronize()

    def close(self) -> None:
        """Nothing to release: the runtime stays open until the process ends."""

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """The seed of the device's generator, as a uint8 tensor on the host."""
        open_runtime()
        return device_module.get_rng_state(device)

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore a state."""
        open_runtime()
        device_module.set_rng_state(state, device)
