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
from drivetrain_toolkit.specs import SINGLE_DEVICE_FEATURES

from drivetrain_xla.probing import look

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend, Probe

__all__ = ["FACTS", "FEATURES", "PRECISIONS", "spec"]

#: One process drives all devices of a machine, so that no launcher is needed.
FACTS = DeviceFacts(
    device_type="xla",
    collective_backend="gloo",
    autocast_type="xla",
    one_device_strategy="single_device",
    several_devices_strategy="spmd",
    several_devices_launcher="none",
    interactive_launcher="none",
)

#: Not ``torch.inference_mode``, in which linear layers fail on XLA devices (torch 2.9).
FEATURES = SINGLE_DEVICE_FEATURES - {Feature.INFERENCE_MODE}

#: Not ``64-true``: a TPU has no float64, and what emulates it is slower by far than a CPU.
PRECISIONS = frozenset({"16-mixed", "16-true", "32-true", "bf16-mixed", "bf16-true"})


def _probe() -> Probe:
    return look(os.environ)


def _load() -> Backend:
    from drivetrain_xla.backend import XlaBackend

    return XlaBackend()


spec = BackendSpec(
    name="xla",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(features=FEATURES, precisions=PRECISIONS),
    facts=FACTS,
    strategies=("single_device", "spmd", "fsdp"),
    probe=_probe,
    load=_load,
    # On CPUs it is for trying things out: whoever wants a CPU means the backend for CPUs.
    priority=0 if os.environ.get("PJRT_DEVICE") == "CPU" else 60,
)
