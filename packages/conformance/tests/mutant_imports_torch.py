"""A spec module that breaks B1: it loads torch."""

from __future__ import annotations

import torch
from drivetrain_interfaces import BackendSpec, Capabilities, ContractVersion, DeviceFacts, Probe
from drivetrain_toolkit.specs import DDP_FEATURES, PRECISIONS


def _load():
    from mutant_parts import backend

    return backend("good")


spec = BackendSpec(
    name="good",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(features=DDP_FEATURES, precisions=PRECISIONS),
    facts=DeviceFacts("cpu", "gloo", "cpu", default_devices=1, indexed=False),
    strategies=("single_device", "ddp"),
    probe=lambda: Probe(2),
    load=_load,
)
assert torch
