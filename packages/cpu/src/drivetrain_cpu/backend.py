"""The factory behind the spec: which part of the toolkit serves a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.specs import PRECISIONS
from drivetrain_toolkit.strategies import DDPStrategy, SingleDeviceStrategy

from drivetrain_cpu import FACTS
from drivetrain_cpu.accelerator import CpuAccelerator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import (
        Accelerator,
        CheckpointIO,
        Collectives,
        Launcher,
        Precision,
        Strategy,
        StrategyContext,
        World,
    )

STRATEGIES: Mapping[str, type[SingleDeviceStrategy | DDPStrategy]] = {
    "single_device": SingleDeviceStrategy,
    "ddp": DDPStrategy,
}


class CpuBackend:
    """Makes the parts of a run on CPUs."""

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        return CpuAccelerator()

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name not in PRECISIONS:
            raise UnsupportedError(
                f"The 'cpu' backend was asked for precision {name!r}, which it does not declare.",
                f"Use one of: {listed(PRECISIONS)}.",
            )
        return make_precision(name, FACTS.autocast_type)

    def collectives(self, world: World) -> Collectives:
        """Communication over gloo; the identity for a single process."""
        if world.size == 1:
            return LocalCollectives()
        return TorchCollectives(world, FACTS.collective_backend)

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name not in STRATEGIES:
            raise UnsupportedError(
                f"The 'cpu' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use one of: {listed(STRATEGIES)}.",
            )
        return STRATEGIES[name]()(context)

    def launcher(self, name: str) -> Launcher | None:
        """None for every name: the shared launchers do."""
        return None

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written by rank 0."""
        # Loaded when all processes have been started, as they wait for this module.
        from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

        return DirectoryCheckpointIO()
