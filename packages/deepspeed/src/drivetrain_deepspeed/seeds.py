"""Classes with the names and arguments that users of the older plugin API know.

New code uses ``DeepSpeedStrategy`` and ``DeepSpeedPrecision``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces import ConfigurationError

from drivetrain_deepspeed.precision import DeepSpeedPrecision
from drivetrain_deepspeed.strategy import DeepSpeedStrategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from drivetrain_interfaces import CheckpointIO, ClusterEnvironment

#: Older arguments, and where they are in DeepSpeed's configuration.
_CONFIGURED: Final = {
    "allgather_partitions": "zero_optimization.allgather_partitions",
    "reduce_scatter": "zero_optimization.reduce_scatter",
    "max_in_cpu": "zero_optimization.offload_param.max_in_cpu",
    "offload_params_buffer_count": "zero_optimization.offload_param.buffer_count",
    "offload_params_buffer_size": "zero_optimization.offload_param.buffer_size",
    "offload_optimizer_buffer_count": "zero_optimization.offload_optimizer.buffer_count",
    "block_size": "aio.block_size",
    "queue_depth": "aio.queue_depth",
    "single_submit": "aio.single_submit",
    "overlap_events": "aio.overlap_events",
    "thread_count": "aio.intra_op_parallelism",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "loss_scale": "fp16.loss_scale",
    "initial_scale_power": "fp16.initial_scale_power",
    "loss_scale_window": "fp16.loss_scale_window",
    "hysteresis": "fp16.hysteresis",
    "min_loss_scale": "fp16.min_loss_scale",
    "partition_activations": "activation_checkpointing.partition_activations",
    "cpu_checkpointing": "activation_checkpointing.cpu_checkpointing",
    "contiguous_memory_optimization": "activation_checkpointing.contiguous_memory_optimization",
    "synchronize_checkpoint_boundary": "activation_checkpointing.synchronize_checkpoint_boundary",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
}


class DeepSpeedPlugin(DeepSpeedStrategy):
    """``DeepSpeedStrategy`` with the older arguments.

    Args:
        zero_optimization: False means stage 0.
        stage: The ZeRO stage.
        cpu_offload: The oldest spelling of ``offload_optimizer``.
        offload_optimizer: Whether the optimizer's state waits elsewhere.
        offload_parameters: Whether parameters wait elsewhere.
        offload_params_device: Where parameters wait: ``"cpu"`` or ``"nvme"``.
        offload_optimizer_device: Where the optimizer's state waits.
        nvme_path: The folder for ``"nvme"``.
        config: DeepSpeed's own configuration, or the path of a file with it.
        parallel_devices: The devices of this machine; None leaves the choice to the trainer.
        cluster_environment: Where a process's place is read from; None detects it.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of ``DeepSpeedStrategy``, and older arguments that are in DeepSpeed's
            configuration, such as ``partition_activations=True``.

    Raises:
        ConfigurationError: An argument that the trainer decides, or one that nothing reads.
    """

    def __init__(
        self,
        zero_optimization: bool = True,  # noqa: FBT001, FBT002 - the older signature
        stage: int = 2,
        *,
        cpu_offload: bool = False,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        offload_optimizer_device: str = "cpu",
        nvme_path: str | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        if "num_nodes" in options:
            raise ConfigurationError(
                f"{type(self).__name__}(num_nodes={options['num_nodes']!r}) was asked for; the "
                "strategy does not decide that.",
                f"Give it to the trainer: Trainer(num_nodes={options['num_nodes']!r}).",
            )
        mapped = {name: options.pop(name) for name in list(options) if name in _CONFIGURED}
        if offload_optimizer or cpu_offload:
            options["offload_optimizer"] = offload_optimizer_device
        if offload_parameters:
            options["offload_parameters"] = offload_params_device
        if nvme_path is not None:
            options["nvme_path"] = nvme_path
        if config is None:
            options["config"] = _nested(mapped)
            options["stage"] = stage if zero_optimization else 0
        elif mapped:
            raise ConfigurationError(
                f"{type(self).__name__} was given config and {sorted(mapped)}, which are parts of "
                "it.",
                "Put them into config.",
            )
        else:
            options["config"] = config
        super().__init__(**options)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.checkpoint_io = checkpoint_io


class DeepSpeedPrecisionPlugin(DeepSpeedPrecision):
    """``DeepSpeedPrecision`` under its older name.

    Args:
        precision: 32, 16 or ``"bf16"``.
        amp_type: Refused unless it is ``"native"``: the engine does not use Apex here.
        amp_level: Refused: a setting of Apex.

    Raises:
        ConfigurationError: Another precision, or a setting of Apex.
    """

    def __init__(
        self, precision: str | int = 32, amp_type: str = "native", amp_level: str | None = None
    ) -> None:
        if str(amp_type).lower().rpartition(".")[2] != "native" or amp_level is not None:
            raise ConfigurationError(
                f"{type(self).__name__}(amp_type={amp_type!r}, amp_level={amp_level!r}) was asked "
                "for, and Apex is not used any more.",
                "Leave both out.",
            )
        super().__init__(precision)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = _CONFIGURED[name].split(".")
        node = made
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return made
