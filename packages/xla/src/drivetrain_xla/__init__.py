"""The XLA backend: a spec that loads neither torch nor torch_xla, for TPUs.

torch_xla runs on CPUs as well, and does so on a machine without a TPU when nobody says otherwise.
Here that takes a word of the user: ``PJRT_DEVICE=CPU``.
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
)
from drivetrain_toolkit.specs import DDP_FEATURES, SHARDED_FEATURES, SINGLE_DEVICE_FEATURES

from drivetrain_xla.probing import look

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import Backend, Probe

__all__ = ["CAPABILITIES", "FACTS", "PRECISIONS", "spec"]

#: Whether the user asked for torch_xla's runtime for CPUs, which serves no process but its own.
_ON_CPU = os.environ.get("PJRT_DEVICE") == "CPU"

#: One process drives all devices of a machine, so that no launcher is needed; but for strategies
#: that want a process for each device.
FACTS = DeviceFacts(
    device_type="xla",
    collective_backend="gloo",
    autocast_type="xla",
    one_device_strategy="single_device",
    several_devices_strategy="spmd",
    several_devices_launcher="none",
    interactive_launcher="none",
    process_launcher="spawn" if _ON_CPU else "torch_xla",
)

#: In ``torch.inference_mode`` linear layers fail on XLA devices (torch 2.9), and torch's layer for
#: batch statistics over ranks does not run on them.
_NOT = frozenset({Feature.INFERENCE_MODE, Feature.SYNC_BATCHNORM})

#: Not ``64-true``: a TPU has no float64, and what emulates it is slower by far than a CPU.
PRECISIONS = frozenset({"16-mixed", "16-true", "32-true", "bf16-mixed", "bf16-true"})

_IN_ONE_PROCESS = Capabilities(features=SINGLE_DEVICE_FEATURES - _NOT, precisions=PRECISIONS)

#: What each strategy can do.
CAPABILITIES: Mapping[str, Capabilities] = {
    "single_device": _IN_ONE_PROCESS,
    "spmd": _IN_ONE_PROCESS,
    "fsdp": _IN_ONE_PROCESS,
    "ddp": Capabilities(features=DDP_FEATURES - _NOT, precisions=PRECISIONS),
    "zero1": Capabilities(features=SHARDED_FEATURES - _NOT, precisions=PRECISIONS),
    # Its collectives are XLA's own, and the runtime for CPUs knows one process. It holds float32.
    "fsdp1": Capabilities(
        features=SHARDED_FEATURES - _NOT - ({Feature.SEVERAL_PROCESSES} if _ON_CPU else set()),
        precisions=frozenset({"32-true", "bf16-mixed"}),
    ),
}


def _probe() -> Probe:
    return look(os.environ)


def _load() -> Backend:
    from drivetrain_xla.backend import XlaBackend

    return XlaBackend()


spec = BackendSpec(
    name="xla",
    contract=ContractVersion(0, 1),
    capabilities=CAPABILITIES["ddp"],
    facts=FACTS,
    strategies=tuple(CAPABILITIES),
    strategy_capabilities=CAPABILITIES,
    probe=_probe,
    load=_load,
    # On CPUs it is for trying things out: whoever wants a CPU means the backend for CPUs.
    priority=0 if _ON_CPU else 60,
)
