"""What the parts in this package can do, as data. Importing this module loads no torch.

A backend builds its ``Capabilities`` from these sets, and adds or removes what its devices change:
``Feature.SYNC_BATCHNORM``, for one, is in none of its sets, because it depends on the device.

Strategies that any eager device can run are registered here once, so that no backend has to name
them: a backend whose facts say ``eager`` has them all.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from drivetrain_interfaces.backend import EAGER, StrategySpec
from drivetrain_interfaces.capabilities import (
    ALL_STEP_HOOKS,
    Capabilities,
    Feature,
    StepHook,
)

from drivetrain_toolkit import CONTRACT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import StrategyFactory

#: What ``SingleDeviceStrategy`` does on every device that torch runs eagerly.
SINGLE_DEVICE_FEATURES = frozenset(
    {
        Feature.ACCUMULATION,
        Feature.CLIP_NORM,
        Feature.CLIP_VALUE,
        Feature.CLOSURE,
        Feature.SEVERAL_OPTIMIZERS,
        Feature.MANUAL_STEP,
        Feature.INFERENCE_MODE,
        Feature.DETERMINISTIC,
    }
)

#: What ``DDPStrategy`` does: all of it, in several processes.
DDP_FEATURES = SINGLE_DEVICE_FEATURES | {Feature.SEVERAL_PROCESSES}

#: What strategies do of which no rank holds everything. An optimizer with a closure would need to
#: look at the whole, and code that calls backward itself would need to know what is where.
SHARDED_FEATURES = DDP_FEATURES - {Feature.CLOSURE, Feature.MANUAL_STEP} | {Feature.SYNC_BATCHNORM}

#: What ``make_precision`` can make.
PRECISIONS = frozenset(
    {
        "16-mixed",
        "16-true",
        "32-true",
        "64-true",
        "bf16-mixed",
        "bf16-true",
    }
)

_FEATURES = {
    "dp": SHARDED_FEATURES - {Feature.SEVERAL_PROCESSES},
    "ddp2": SHARDED_FEATURES,
    "rpc": DDP_FEATURES | {Feature.SYNC_BATCHNORM},
    "zero1": SHARDED_FEATURES,
    "zero2": SHARDED_FEATURES,
    "fsdp": SHARDED_FEATURES,
    "tp": SHARDED_FEATURES - {Feature.SYNC_BATCHNORM},
}

#: What each registered strategy can do; a run has what both it and its backend can.
CAPABILITIES: Mapping[str, Capabilities] = {
    name: Capabilities(features=features, precisions=PRECISIONS)
    for name, features in _FEATURES.items()
}


#: One backward is many here, on a rank that does not hold what is scaled.
CAPABILITIES = {
    **CAPABILITIES,
    "pipeline": Capabilities(
        features=SHARDED_FEATURES - {Feature.SYNC_BATCHNORM},
        precisions=frozenset({"32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"}),
        hooks=ALL_STEP_HOOKS - {StepHook.BEFORE_BACKWARD},
    ),
}


def _load(target: str) -> StrategyFactory:
    module, _, name = target.partition(":")
    factory: StrategyFactory = getattr(
        import_module(f"drivetrain_toolkit.strategies.{module}"), name
    )()
    return factory


def _spec(name: str, target: str, *, one_process: bool = False) -> StrategySpec:
    return StrategySpec(
        name=name,
        contract=CONTRACT,
        device_types=frozenset({EAGER}),
        capabilities=CAPABILITIES[name],
        load=partial(_load, target),
        one_process=one_process,
    )


ZERO1 = _spec("zero1", "zero1:Zero1Strategy")
ZERO2 = _spec("zero2", "fsdp:Zero2Strategy")
FSDP = _spec("fsdp", "fsdp:FSDPStrategy")
DP = _spec("dp", "dp:DataParallelStrategy", one_process=True)
DDP2 = _spec("ddp2", "ddp2:DDP2Strategy")
RPC = _spec("rpc", "remote:RPCStrategy")
TP = _spec("tp", "tensor_parallel:TensorParallelStrategy")
PIPELINE = _spec("pipeline", "pipeline:PipelineStrategy")
