"""The DeepSpeed engine as a strategy: a spec that loads neither torch nor DeepSpeed.

Each name stands for one way to divide a model over ranks; ``DeepSpeedStrategy`` has all options.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    Capabilities,
    ContractVersion,
    Feature,
    StepHook,
    StrategySpec,
)

if TYPE_CHECKING:
    from drivetrain_interfaces import StrategyFactory

    from drivetrain_deepspeed.native import make_universal, read_native
    from drivetrain_deepspeed.optimizers import build_cpu_adam, cpu_adam
    from drivetrain_deepspeed.strategy import DeepSpeedStrategy

__all__ = [
    "CAPABILITIES",
    "DeepSpeedStrategy",
    "build_cpu_adam",
    "cpu_adam",
    "make_universal",
    "read_native",
    "spec",
]

#: The engine owns backward, clipping, accumulation and the update. So there is no moment between
#: them at which user code could be called, and one optimizer per engine.
CAPABILITIES = Capabilities(
    features=frozenset(
        {
            Feature.ACCUMULATION,
            Feature.CLIP_NORM,
            Feature.INFERENCE_MODE,
            Feature.DETERMINISTIC,
            Feature.SEVERAL_PROCESSES,
        }
    ),
    precisions=frozenset({"32-true", "bf16-mixed", "bf16-true"}),
    hooks=frozenset({StepHook.BEFORE_BACKWARD, StepHook.AFTER_BACKWARD}),
)
#: At stage 0 nothing keeps parameters in float32 beside those in bfloat16.
_STAGE_0 = Capabilities(
    CAPABILITIES.features, CAPABILITIES.precisions - {"bf16-true"}, CAPABILITIES.hooks
)

_LAZY = {
    "DeepSpeedStrategy": "drivetrain_deepspeed.strategy",
    "build_cpu_adam": "drivetrain_deepspeed.optimizers",
    "cpu_adam": "drivetrain_deepspeed.optimizers",
    "make_universal": "drivetrain_deepspeed.native",
    "read_native": "drivetrain_deepspeed.native",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def _load(options: dict[str, Any]) -> StrategyFactory:
    from drivetrain_deepspeed.strategy import DeepSpeedStrategy

    return DeepSpeedStrategy(**options)


def _spec(name: str, capabilities: Capabilities = CAPABILITIES, **options: Any) -> StrategySpec:
    return StrategySpec(
        name=name,
        contract=ContractVersion(0, 1),
        device_types=frozenset({"cpu", "cuda", "hpu", "xpu", "npu"}),
        capabilities=capabilities,
        load=partial(_load, options),
    )


spec = _spec("deepspeed")
stage_0 = _spec("deepspeed_stage_0", _STAGE_0, stage=0)
stage_1 = _spec("deepspeed_stage_1", stage=1)
stage_1_offload = _spec("deepspeed_stage_1_offload", stage=1, offload_optimizer="cpu")
stage_2 = _spec("deepspeed_stage_2", stage=2)
stage_2_offload = _spec("deepspeed_stage_2_offload", stage=2, offload_optimizer="cpu")
stage_3 = _spec("deepspeed_stage_3", stage=3)
stage_3_offload = _spec(
    "deepspeed_stage_3_offload", stage=3, offload_optimizer="cpu", offload_parameters="cpu"
)
#: For the folder that users of the older names know; ``DeepSpeedStrategy`` takes any.
stage_3_offload_nvme = _spec(
    "deepspeed_stage_3_offload_nvme",
    stage=3,
    offload_optimizer="nvme",
    offload_parameters="nvme",
    nvme_path="/local_nvme",
)
