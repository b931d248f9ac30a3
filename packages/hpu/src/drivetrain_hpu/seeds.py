"""Classes with the names and arguments that users of older plugin APIs know."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from drivetrain_toolkit.seeds import MixedPrecisionPlugin, SingleDevicePlugin

from drivetrain_hpu.accelerator import HpuAccelerator
from drivetrain_hpu.checkpoint import HpuCheckpointIO
from drivetrain_hpu.precision import precision as make_precision
from drivetrain_hpu.strategies import HpuDDP, HpuSingleDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from drivetrain_interfaces import CheckpointIO, ClusterEnvironment

#: What the vendor's older mixed precision was asked by, and is not any more.
_LISTS = ("opt_level", "bf16_file_path", "fp32_file_path")
_NAMES = {"32": "32-true", 32: "32-true", "bf16": "bf16-mixed", "16": "16-mixed", 16: "16-mixed"}


class HPUAccelerator(HpuAccelerator):
    """The older name of ``HpuAccelerator``."""


class HPUPrecisionPlugin(MixedPrecisionPlugin):
    """A precision by its older names.

    The vendor's own mixed precision with operator lists does not exist any more; autocast took its
    place. Lists are given to it by the variables ``PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST`` and
    ``PT_HPU_AUTOCAST_FP32_OPS_LIST``, before the program starts.

    Args:
        precision: ``"32"``, ``"bf16"``, ``"16"``, or a name of today such as ``"fp8"``.
        opt_level: Has no meaning any more.
        bf16_file_path: Has none either, nor the next two.
        fp32_file_path: As above.
        verbose: As above.

    Raises:
        UnsupportedError: There is no such precision.
    """

    def __init__(
        self,
        precision: str | int = "32-true",
        opt_level: str = "O2",
        bf16_file_path: str | None = None,
        fp32_file_path: str | None = None,
        verbose: bool = False,  # noqa: FBT001, FBT002 - the older signature
    ) -> None:
        if opt_level != "O2" or bf16_file_path or fp32_file_path or verbose:
            warnings.warn(
                f"HPUPrecisionPlugin was given {', '.join(_LISTS)} or verbose, which belong to a "
                "mixed precision that Gaudi software does not have any more, and are not used. "
                "Autocast takes its lists from PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST and "
                "PT_HPU_AUTOCAST_FP32_OPS_LIST.",
                stacklevel=2,
            )
        inner: Any = make_precision(_NAMES.get(precision, str(precision)))
        self._inner = inner
        self.name = inner.name
        self.policy = inner.policy


class SingleHPUStrategy(HpuSingleDevice, SingleDevicePlugin):
    """One process on one device.

    Args:
        device: The device that is expected; None takes the accelerator's.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of ``HpuSingleDevice``.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        expected = None if isinstance(device, int) else device  # every process has its own hpu:0
        SingleDevicePlugin.__init__(self, expected, checkpoint_io)
        HpuSingleDevice.__init__(self, **options)


class HPUParallelStrategy(HpuDDP):
    """Several processes, one device each, whose gradients are averaged.

    Args:
        parallel_devices: The devices of this machine; None takes all.
        cluster_environment: Where a process's place is read from; None detects it.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of ``HpuDDP``.
    """

    def __init__(
        self,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.checkpoint_io = checkpoint_io


class HPUCheckpointIO(HpuCheckpointIO):
    """The older name of ``HpuCheckpointIO``."""
