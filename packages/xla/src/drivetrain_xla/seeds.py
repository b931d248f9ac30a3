"""Classes with the names and arguments that users of the older plugin API know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_toolkit.precision import TruePrecision
from drivetrain_toolkit.seeds import OldParallelStrategy, PrecisionPlugin, SingleDevicePlugin

from drivetrain_xla import FACTS
from drivetrain_xla.checkpoint import XlaCheckpointIO
from drivetrain_xla.replicas import ReplicaStrategy
from drivetrain_xla.strategies import XlaStrategy

if TYPE_CHECKING:
    from drivetrain_interfaces import CheckpointIO


class SingleTPUPlugin(XlaStrategy, SingleDevicePlugin):
    """One process on one device.

    Args:
        device: The device that is expected, also by its index; None takes the accelerator's.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of ``XlaStrategy``.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        if isinstance(device, int):
            device = torch.device(FACTS.device_type, device)
        SingleDevicePlugin.__init__(self, device, checkpoint_io)
        XlaStrategy.__init__(self, **options)


class TPUSpawnPlugin(OldParallelStrategy, ReplicaStrategy):
    """A process for each device, started by ``torch_xla.launch``, or by whoever starts them.

    ``ReplicaStrategy`` with the arguments of ``OldParallelStrategy``.
    """


class TPUPrecisionPlugin(PrecisionPlugin):
    """Full precision, and the base of a precision of one's own for TPUs."""


class TPUBf16PrecisionPlugin(TruePrecision, TPUPrecisionPlugin):
    """Parameters and inputs in bfloat16, without variables that change the whole process."""

    def __init__(self) -> None:
        super().__init__("bf16-true")


class TPUHalfPrecisionPlugin(TPUBf16PrecisionPlugin):
    """Half precision as TPUs have it, which is bfloat16."""


class XLACheckpointIO(XlaCheckpointIO):
    """The older name of ``XlaCheckpointIO``."""
