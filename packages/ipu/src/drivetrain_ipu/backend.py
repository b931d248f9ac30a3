"""The factory behind the spec: which part serves which contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import UnsupportedError

from drivetrain_ipu import STRATEGY
from drivetrain_ipu.accelerator import IpuAccelerator
from drivetrain_ipu.checkpoint import make_checkpoint_io
from drivetrain_ipu.collectives import make_collectives
from drivetrain_ipu.precision import make_precision
from drivetrain_ipu.strategy import IpuStrategy

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


class IpuBackend:
    """Makes the parts of a run on IPUs."""

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        return IpuAccelerator()

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        return make_precision(name)

    def collectives(self, world: World) -> Collectives:
        """Communication between hosts; gradients go between IPUs. The identity for one process."""
        return make_collectives(world)

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name != STRATEGY:
            raise UnsupportedError(
                f"The 'ipu' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use {STRATEGY!r}.",
            )
        return IpuStrategy()(context)

    def launcher(self, name: str) -> Launcher | None:
        """None for every name: replicas need no processes, and ``PoprunLauncher`` is an object."""
        return None

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written from the host."""
        return make_checkpoint_io()
