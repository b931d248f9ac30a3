"""What a vendor writes: an accelerator, and the toolkit for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnavailableError, UnsupportedError
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.strategies import SingleDeviceStrategy

from acme_npu import FACTS, spec

if TYPE_CHECKING:
    from drivetrain_interfaces import (
        Accelerator,
        CheckpointIO,
        Collectives,
        DeviceFacts,
        Launcher,
        Precision,
        Strategy,
        StrategyContext,
        World,
    )


class NpuAccelerator:
    @property
    def facts(self) -> DeviceFacts:
        return FACTS

    @property
    def device_type(self) -> str:
        return FACTS.device_type

    def device_count(self) -> int:
        return 2

    def activate(self, index: int, local_size: int) -> torch.device:
        if index >= self.device_count():
            raise UnavailableError(f"Device {index} was asked for; there are 2.", "Use 0 or 1.")
        return torch.device("cpu")

    def synchronize(self, device: torch.device) -> None:
        pass

    def close(self) -> None:
        pass


class NpuBackend:
    def accelerator(self) -> Accelerator:
        return NpuAccelerator()

    def precision(self, name: str) -> Precision:
        if name not in spec.capabilities.precisions:
            raise UnsupportedError(f"acme-npu has no precision {name!r}.", "Use '32-true'.")
        return make_precision(name, FACTS.autocast_type)

    def collectives(self, world: World) -> Collectives:
        return LocalCollectives() if world.size == 1 else TorchCollectives(world, "gloo")

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        if name not in spec.strategies:
            raise UnsupportedError(f"acme-npu has no strategy {name!r}.", "Use 'single_device'.")
        return SingleDeviceStrategy()(context)

    def launcher(self, name: str) -> Launcher | None:
        return None

    def checkpoint_io(self) -> CheckpointIO:
        return DirectoryCheckpointIO()
