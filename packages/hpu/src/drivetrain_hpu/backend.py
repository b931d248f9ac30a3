"""The factory behind the spec: which part serves which contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.collectives import LocalCollectives

from drivetrain_hpu.accelerator import HpuAccelerator
from drivetrain_hpu.checkpoint import HpuCheckpointIO
from drivetrain_hpu.collectives import HpuCollectives
from drivetrain_hpu.launcher import LAUNCHERS
from drivetrain_hpu.precision import precision

if TYPE_CHECKING:
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


class HpuBackend:
    """Makes the parts of a run on Gaudi. Making it imports no part of the Gaudi software."""

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        return HpuAccelerator()

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        return precision(name)

    def collectives(self, world: World) -> Collectives:
        """Communication over HCCL, and over gloo for what that would round; one is the identity."""
        return LocalCollectives() if world.size == 1 else HpuCollectives(world)

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        from drivetrain_hpu.strategies import STRATEGIES

        if name not in STRATEGIES:
            raise UnsupportedError(
                f"The 'hpu' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use one of: {listed(STRATEGIES)}.",
            )
        return STRATEGIES[name]()(context)

    def launcher(self, name: str) -> Launcher | None:
        """Launchers that give each process a module of its own; the shared ones for the rest."""
        kind = LAUNCHERS.get(name)
        return None if kind is None else cast("Launcher", kind())

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written from the host."""
        return HpuCheckpointIO()
