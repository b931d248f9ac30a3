"""The factory behind the spec: which part serves which contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives
from drivetrain_toolkit.precision import make_precision

from drivetrain_xla import CAPABILITIES, FACTS, PRECISIONS
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
        """Communication from host to host, which tensors of devices reach by way of the host.

        Given a tensor of an XLA device, gloo leaves it as it is and reports no error (torch 2.9).
        """
        if world.size == 1:
            return LocalCollectives()
        return TorchCollectives(world, FACTS.collective_backend, device=torch.device("cpu"))

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name not in CAPABILITIES:
            raise UnsupportedError(
                f"The 'xla' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use one of: {listed(CAPABILITIES)}.",
            )
        load_library()
        from drivetrain_xla.fsdp1 import ShardedReplicaStrategy
        from drivetrain_xla.replicas import ReplicaStrategy
        from drivetrain_xla.spmd import SpmdShardedStrategy, SpmdStrategy
        from drivetrain_xla.strategies import XlaStrategy
        from drivetrain_xla.zero1 import Zero1ReplicaStrategy

        kinds: tuple[type[XlaStrategy], ...] = (
            *(XlaStrategy, SpmdStrategy, SpmdShardedStrategy),
            *(ReplicaStrategy, Zero1ReplicaStrategy, ShardedReplicaStrategy),
        )
        return next(kind for kind in kinds if kind.name == name)()(context)

    def launcher(self, name: str) -> Launcher | None:
        """``torch_xla``, which starts a process for each chip; None for other names."""
        from drivetrain_xla.launcher import XlaLauncher

        return XlaLauncher() if name == XlaLauncher.name else None

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written from the host."""
        load_library()
        from drivetrain_xla.checkpoint import XlaCheckpointIO

        return XlaCheckpointIO()
