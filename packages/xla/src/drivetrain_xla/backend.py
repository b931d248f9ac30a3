"""The factory behind the spec: which part serves which contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.precision import make_precision

from drivetrain_xla import FACTS, PRECISIONS
from drivetrain_xla.accelerator import XlaAccelerator
from drivetrain_xla.runtime import load_library

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

_NAMES = ("fsdp", "single_device", "spmd")


class XlaBackend:
    """Makes the parts of a run on XLA devices."""

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        return XlaAccelerator()

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name not in PRECISIONS:
            raise UnsupportedError(
                f"The 'xla' backend was asked for precision {name!r}, which it does not declare.",
                f"Use one of: {listed(PRECISIONS)}.",
            )
        return make_precision(name, FACTS.autocast_type)

    def collectives(self, world: World) -> Collectives:
        """The identity: there is one process. Raises ``UnsupportedError`` for several."""
        if world.size > 1:
            raise UnsupportedError(
                f"The 'xla' backend was asked to connect a world of {world.size} processes.",
                "Start one process, which drives all devices of a machine.",
            )
        return LocalCollectives()

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name not in _NAMES:
            raise UnsupportedError(
                f"The 'xla' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use one of: {listed(_NAMES)}.",
            )
        load_library()
        from drivetrain_xla.spmd import SpmdShardedStrategy, SpmdStrategy
        from drivetrain_xla.strategies import XlaStrategy

        kinds = (XlaStrategy, SpmdStrategy, SpmdShardedStrategy)
        return next(kind for kind in kinds if kind.name == name)()(context)

    def launcher(self, name: str) -> Launcher | None:
        """None for every name: no processes are started."""
        return None

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written from the host."""
        load_library()
        from drivetrain_xla.checkpoint import XlaCheckpointIO

        return XlaCheckpointIO()
