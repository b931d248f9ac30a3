"""The class with the name and arguments that users of the older plugin API know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_horovod.strategy import HorovodStrategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from drivetrain_interfaces import CheckpointIO, ClusterEnvironment


class HorovodPlugin(HorovodStrategy):
    """``HorovodStrategy`` with the older arguments. It no longer multiplies learning rates.

    Args:
        parallel_devices: The devices of this machine; None leaves the choice to the trainer.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of ``HorovodStrategy``.
    """

    cluster_environment: ClusterEnvironment | None = None

    def __init__(
        self,
        parallel_devices: Sequence[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.parallel_devices = parallel_devices
        self.checkpoint_io = checkpoint_io
