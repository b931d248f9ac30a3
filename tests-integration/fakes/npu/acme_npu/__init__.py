"""A backend of a vendor that nobody here has heard of. It computes with CPU tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import BackendSpec, Capabilities, ContractVersion, DeviceFacts, Probe
from drivetrain_toolkit.specs import SINGLE_DEVICE_FEATURES

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

FACTS = DeviceFacts(
    device_type="cpu", collective_backend="gloo", autocast_type="cpu", default_devices=1
)


def _load() -> Backend:
    from acme_npu.backend import NpuBackend

    return NpuBackend()


spec = BackendSpec(
    name="npu",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(
        features=SINGLE_DEVICE_FEATURES, precisions=frozenset({"32-true", "bf16-mixed"})
    ),
    facts=FACTS,
    strategies=("single_device",),
    probe=lambda: Probe(2, names=("npu-a", "npu-b")),
    load=_load,
    priority=90,
)
