"""Classes with the names and arguments that users of the older plugin API know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

from drivetrain_ipu.accelerator import IpuAccelerator
from drivetrain_ipu.precision import HalfPrecision, IpuPrecision, MixedPrecision
from drivetrain_ipu.strategy import IpuStrategy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch
    from drivetrain_interfaces import CheckpointIO, ClusterEnvironment
    from torch import nn

_PRECISIONS = {
    "16": MixedPrecision,
    "16-mixed": MixedPrecision,
    "16-true": HalfPrecision,
    "32": IpuPrecision,
    "32-true": IpuPrecision,
}


class IPUPrecisionPlugin(IpuPrecision):
    """The precision of that name.

    Args:
        precision: ``32``, ``16`` (mixed), or a name in full.

    Raises:
        ConfigurationError: IPUs have no such format.
    """

    def __init__(self, precision: int | str = 32) -> None:
        kind = _PRECISIONS.get(str(precision))
        if kind is None:
            raise ConfigurationError(
                f"IPUPrecisionPlugin({precision!r}) was asked for, and IPUs have float32 and "
                "float16.",
                f"Use one of {', '.join(_PRECISIONS)}.",
            )
        self.precision = precision
        self._inner = kind()
        self.name, self.policy = kind.name, kind.policy

    def convert(self, module: nn.Module) -> nn.Module:
        """The module in that precision."""
        return self._inner.convert(module)

    def forward(self) -> AbstractContextManager[Any]:
        """A new context for one forward pass."""
        return self._inner.forward()


class IPUPlugin(IpuStrategy):
    """The strategy under its older name.

    Args:
        device_iterations: Updates of one call.
        autoreport: Write a profile.
        autoreport_dir: Where to; ``None`` takes the current folder.
        parallel_devices: The devices of this machine; None takes ``devices=``.
        cluster_environment: Where a process's place is read from; None detects it.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of ``IpuStrategy``.
    """

    def __init__(
        self,
        device_iterations: int = 1,
        autoreport: bool = False,  # noqa: FBT001, FBT002 - the older signature
        autoreport_dir: str | None = None,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        if autoreport:
            options.setdefault("profile_folder", autoreport_dir or ".")
        super().__init__(device_iterations=device_iterations, **options)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.checkpoint_io = checkpoint_io


class IPUStrategy(IPUPlugin):
    """The name that followed ``IPUPlugin``."""


class IPUAccelerator(IpuAccelerator):
    """The accelerator under its older name."""
