"""The Gaudi backend: a spec that loads neither torch nor Intel's bridge.

Both load when the backend is chosen, and then in the process that trains: importing the bridge
changes torch and the environment of a process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    ContractVersion,
    DeviceFacts,
    Feature,
    StrategySpec,
)
from drivetrain_toolkit.specs import DDP_FEATURES, SHARDED_FEATURES

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend, Probe, StrategyFactory

__all__ = ["FACTS", "FEATURES", "PRECISIONS", "fsdp", "spec"]

#: A process has one device, which is always ``hpu:0`` there; an index here is that of a module.
#: Not ``eager``: strategies written for other devices use reductions that HCCL does not have.
FACTS = DeviceFacts(
    device_type="hpu",
    collective_backend="hccl",
    autocast_type="hpu",
    one_device_strategy="single_device",
    several_devices_strategy="ddp",
    several_devices_launcher="script",
    interactive_launcher="spawn",
    default_devices=0,
    indexed=True,
)

#: Not ``torch.inference_mode``, whose tensors HPU graphs refuse; evaluation runs in ``no_grad``.
FEATURES = DDP_FEATURES - {Feature.INFERENCE_MODE}

#: Not ``16-true``, which the vendor does not validate for training, and not ``64-true``: Gaudi
#: computes float64 as float32.
PRECISIONS = frozenset({"16-mixed", "32-true", "bf16-mixed", "bf16-true", "fp8"})


def _probe() -> Probe:
    from drivetrain_hpu.probing import probe

    return probe(os.environ)


def _load() -> Backend:
    from drivetrain_hpu.backend import HpuBackend

    return HpuBackend()


def _load_fsdp() -> StrategyFactory:
    from drivetrain_hpu.strategies import HpuFSDP

    return HpuFSDP()


#: Has a spec of its own, because it can do less than the others.
fsdp = StrategySpec(
    name="hpu_fsdp",
    contract=ContractVersion(0, 1),
    device_types=frozenset({"hpu"}),
    capabilities=Capabilities(features=SHARDED_FEATURES & FEATURES, precisions=PRECISIONS),
    load=_load_fsdp,
)

spec = BackendSpec(
    name="hpu",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(features=FEATURES, precisions=PRECISIONS),
    facts=FACTS,
    strategies=("single_device", "ddp"),
    probe=_probe,
    load=_load,
    priority=55,
)
