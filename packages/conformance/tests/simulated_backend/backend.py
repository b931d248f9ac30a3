"""The factory behind the spec: which part of the toolkit serves a simulated device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives
from drivetrain_toolkit.precision import make_precision

from drivetrain_conformance import simulated
from simulated_backend import FACTS, capabilities
from simulated_backend.accelerator import SimulatedAccelerator
from simulated_backend.steps import STRATEGIES

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


class SimulatedBackend:
    """Makes the parts of a run on simulated devices. Making it installs them."""

    def __init__(self) -> None:
        simulated.install(FACTS.device_type)

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        return SimulatedAccelerator()

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        declared = capabilities(simulated.current_options()).precisions
        if name not in declared:
            raise UnsupportedError(
                f"The 'sim' backend was asked for precision {name!r}, which it does not declare.",
                f"Use one of: {listed(declared)}.",
            )
        return make_precision(name, FACTS.autocast_type)

    def collectives(self, world: World) -> Collectives:
        """Communication between devices; the identity for a single process."""
        if world.size == 1:
            return LocalCollectives()
        device = torch.device(
            FACTS.device_type, world.local_rank % simulated.current_options().devices
        )
        return TorchCollectives(world, FACTS.collective_backend, device=device)

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        if name not in STRATEGIES:
            raise UnsupportedError(
                f"The 'sim' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use one of: {listed(STRATEGIES)}.",
            )
        return STRATEGIES[name]()(context)

    def launcher(self, name: str) -> Launcher | None:
        """None for every name: the shared launchers do."""
        return None

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written by rank 0."""
        return DirectoryCheckpointIO()
