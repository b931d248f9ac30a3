"""Older names of strategies that do more than DDP; ``drivetrain_toolkit.seeds`` has them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

from drivetrain_toolkit.seeds import DDPPlugin, OldStrategy
from drivetrain_toolkit.strategies import (
    DataParallelStrategy,
    DDP2Strategy,
    PipelineStrategy,
    RPCStrategy,
    Zero1Strategy,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from drivetrain_interfaces import CheckpointIO, ClusterEnvironment


class DataParallelPlugin(OldStrategy, DataParallelStrategy):
    """``DataParallelStrategy`` with the older arguments.

    Args:
        parallel_devices: The devices; None means those that the trainer was given.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.

    Raises:
        ConfigurationError: A device has no index.
    """

    def __init__(
        self,
        parallel_devices: Sequence[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
    ) -> None:
        indices = None
        if parallel_devices is not None:
            indices = [device.index for device in parallel_devices]
            if not indices or None in indices:
                raise ConfigurationError(
                    f"{type(self).__name__}(parallel_devices={list(map(str, parallel_devices))}) "
                    "was asked for, and one process needs devices that have an index.",
                    "Leave it out, and give devices= to the trainer.",
                )
        super().__init__(devices=indices)
        self.checkpoint_io = checkpoint_io


class DDP2Plugin(DDPPlugin, DDP2Strategy):
    """``DDP2Strategy`` with the older arguments, which are those of ``DDPPlugin``."""


class DDPShardedPlugin(DDPPlugin, Zero1Strategy):
    """``Zero1Strategy`` with the older arguments, which are those of ``DDPPlugin``."""


class RPCPlugin(DDPPlugin, RPCStrategy):
    """``RPCStrategy`` with the older arguments.

    Args:
        rpc_timeout_sec: Seconds that a call may take.
        parallel_devices: As for ``DDPPlugin``, like all that follow.
        num_nodes: Refused: an argument of the trainer.
        cluster_environment: Where a process's place is read from; None detects it.
        sync_batchnorm: Refused: an argument of the trainer.
        options: Options of ``DDPStrategy``.
    """

    def __init__(
        self,
        rpc_timeout_sec: float = 60.0,
        parallel_devices: Sequence[torch.device] | None = None,
        num_nodes: int | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        sync_batchnorm: bool | None = None,  # noqa: FBT001 - the older signature
        **options: Any,
    ) -> None:
        super().__init__(
            parallel_devices,
            num_nodes,
            cluster_environment,
            sync_batchnorm,
            rpc_timeout_s=rpc_timeout_sec,
            **options,
        )


class RPCSequentialPlugin(OldStrategy, PipelineStrategy):
    """``PipelineStrategy`` with the older arguments.

    The sequence is the module's ``sequential_module``, its only child that is one, or itself.

    Args:
        balance: Layers of each stage; None divides parameters as evenly as layers allow.
        microbatches: Parts of a batch.
        checkpoint: ``"always"`` and ``"except_last"`` make activations again in backward.
        balance_mode: ``"balance_by_size"``.
        pipelined_backward: Backward is always pipelined.
        rpc_timeout_sec: Refused: stages send to each other without calls.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.

    Raises:
        ConfigurationError: An argument asks for what is not done any more.
    """

    def __init__(
        self,
        balance: Sequence[int] | None = None,
        microbatches: int = 8,
        checkpoint: str = "except_last",
        balance_mode: str = "balance_by_size",
        pipelined_backward: bool | None = True,  # noqa: FBT001, FBT002 - the older signature
        rpc_timeout_sec: float | None = None,
        *,
        checkpoint_io: CheckpointIO | None = None,
    ) -> None:
        for name, value, known in (
            ("checkpoint", checkpoint, ("always", "except_last", "never")),
            ("balance_mode", balance_mode, ("balance_by_size",)),
            ("pipelined_backward", pipelined_backward, (True, None)),
            ("rpc_timeout_sec", rpc_timeout_sec, (None,)),
        ):
            if value not in known:
                raise ConfigurationError(
                    f"{type(self).__name__}({name}={value!r}) was asked for; there is "
                    f"{', '.join(map(repr, known))}.",
                    "Use one of these, or leave it out.",
                )
        super().__init__(
            balance=balance,
            microbatches=microbatches,
            activation_checkpointing=checkpoint != "never",
        )
        self.checkpoint_io = checkpoint_io
