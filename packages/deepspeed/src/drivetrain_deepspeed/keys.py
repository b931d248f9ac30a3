"""Keys that DeepSpeed 0.19 reads from its configuration, and which of them are not the user's.

DeepSpeed takes keys that it does not know without a word, at the top and in the sections that are
listed here. The others it checks itself.
"""

from __future__ import annotations

from typing import Final


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP: Final = _keys(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comms_logger
    communication_data_type compile compression_training csv_monitor comet curriculum_learning
    data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation
    memory_breakdown monitor_config optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """
)

SECTIONS: Final = {
    "activation_checkpointing": _keys(
        """
        contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations
        profile synchronize_checkpoint_boundary
        """
    ),
    "aio": _keys(
        """
        block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds
        """
    ),
    "checkpoint": _keys(
        """
        checkpoint_serialization load_universal parallel_write tag_validation
        use_node_local_storage writer
        """
    ),
    "data_types": frozenset(
        {"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"}
    ),
    "scheduler": frozenset({"params", "type"}),
    "torch_autocast": frozenset({"dtype", "enabled", "lower_precision_safe_modules"}),
}

#: Sections and settings that would take over what the trainer does, and what to use instead.
NOT_HERE: Final = {
    "optimizer": "build it in configure_optimizers; cpu_adam() is DeepSpeed's for offload",
    "torch_autocast": "set precision='bf16-mixed'",
    "tensor_parallel": "leave it out; the strategy has one model per rank",
    "expert_parallel": "leave it out; the strategy has one model per rank",
    "pipeline": "leave it out; the strategy has one model per rank",
    "sequence_parallel_size": "leave it out; the strategy has one model per rank",
    "hybrid_engine": "leave it out; the engine is used for training alone",
    "autotuning": "tune with DeepSpeed's own launcher, and give the result here",
    "elasticity": "leave it out; the launcher decides how many processes there are",
    "data_efficiency": "leave it out; the trainer owns the data",
    "curriculum_learning": "leave it out; the trainer owns the data",
    "managed_gradient_accumulation": "leave it out; the trainer says when a window ends",
}

#: Values that may be ``"auto"``: what the trainer knows, or what DeepSpeed decides itself.
FILLED: Final = frozenset(
    {
        "bf16.enabled",
        "bfloat16.enabled",
        "fp16.enabled",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_optimization.stage",
    }
)
LEFT_TO_ENGINE: Final = frozenset(
    {
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.overlap_comm",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.sub_group_size",
        "data_types.keep_in_fp32_modules",
    }
)
