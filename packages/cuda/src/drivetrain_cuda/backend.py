"""The factory behind the spec: which part serves a CUDA device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives
from drivetrain_toolkit.strategies import DDPStrategy, SingleDeviceStrategy
from drivetrain_toolkit.tuned import Tuned

from drivetrain_cuda import FACTS
from drivetrain_cuda.accelerator import CudaAccelerator
from drivetrain_cuda.launcher import CudaForkLauncher
from drivetrain_cuda.precision import precision

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
#: Asks for another library than NCCL. A variable, so that all processes of a run inherit it.
COLLECTIVES = "DRIVETRAIN_CUDA_COLLECTIVES"
_LIBRARIES = ("nccl", "gloo")


class CudaBackend:
    """Makes the parts of a run on CUDA devices."""

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        return CudaAccelerator()

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        return precision(name)

    def collectives(self, world: World) -> Collectives:
        """Communication over NCCL, or over gloo on request; the identity for a single process.

        Raises:
            ConfigurationError: Another library was asked for, or torch was built without it.
        """
        if world.size == 1:
            return LocalCollectives()
        name = library(os.environ)
        # NCCL takes tensors of devices only; the one that activate made current is this process's.
        device = torch.device(FACTS.device_type, torch.cuda.current_device())
        return TorchCollectives(world, name, device=device if name == "nccl" else None)

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name, which copies batches on a stream of their own.

        Raises:
            UnsupportedError: It is not declared.
        """
        if name not in STRATEGIES:
            raise UnsupportedError(
                f"The 'cuda' backend was asked for strategy {name!r}, which it does not declare.",
                f"Use one of: {listed(STRATEGIES)}.",
            )
        return Tuned(STRATEGIES[name]())(context)

    def launcher(self, name: str) -> Launcher | None:
        """Forking that refuses when it cannot work; the shared launchers for the rest."""
        return CudaForkLauncher() if name == "fork" else None

    def checkpoint_io(self) -> CheckpointIO:
        """Checkpoints as directories, written by rank 0."""
        return DirectoryCheckpointIO()


def library(env: Mapping[str, str]) -> str:
    """The ``torch.distributed`` backend that a process with these variables uses.

    Raises:
        ConfigurationError: An unknown one was asked for, or torch was built without it.
    """
    name = env.get(COLLECTIVES) or FACTS.collective_backend
    if name not in _LIBRARIES:
        raise ConfigurationError(
            f"{COLLECTIVES}={name!r} was asked for; it is one of {', '.join(_LIBRARIES)}.",
            "Set it to one of them, or unset it for NCCL.",
        )
    there = {
        "nccl": torch.distributed.is_nccl_available,
        "gloo": torch.distributed.is_gloo_available,
    }
    if not there[name]():
        raise ConfigurationError(
            f"Several processes on CUDA devices need {name!r}, and torch {torch.__version__} is "
            "built without it.",
            f"Install a torch with it, or set {COLLECTIVES}=gloo, which is slower.",
        )
    return name
