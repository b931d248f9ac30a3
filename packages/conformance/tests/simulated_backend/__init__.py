"""A backend for the simulated accelerator: a spec that loads no torch. The rest loads when chosen.

Name it by ``simulated_backend:spec``, with the folder that holds it on ``PYTHONPATH``. What it
declares follows the options of the device, which it takes from the environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    ContractVersion,
    DeviceFacts,
    DrivetrainError,
    Feature,
    Probe,
)
from drivetrain_toolkit.specs import DDP_FEATURES, PRECISIONS

from drivetrain_conformance import simulated

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

__all__ = ["FACTS", "capabilities", "spec"]

FACTS = DeviceFacts(
    device_type="sim",
    collective_backend=simulated.COLLECTIVE_BACKEND,
    autocast_type="sim",
    one_device_strategy="single_device",
    several_devices_strategy="ddp",
    several_devices_launcher="script",
    interactive_launcher="spawn",
    default_devices=1,
    indexed=True,
    eager=True,
)


def capabilities(options: simulated.Options) -> Capabilities:
    """What the backend can do on devices that are like this."""
    features = DDP_FEATURES | {Feature.SYNC_BATCHNORM}
    if not options.inference_mode:
        features -= {Feature.INFERENCE_MODE}
    precisions = PRECISIONS if options.fp16 else PRECISIONS - {"16-mixed", "16-true"}
    return Capabilities(features=features, precisions=precisions)


def _probe() -> Probe:
    if reason := simulated.unavailable():
        return Probe(devices=0, reason=reason)
    try:
        options = simulated.Options.from_environment()
    except DrivetrainError as error:
        return Probe(devices=0, reason=str(error))
    return Probe(
        devices=options.devices,
        names=tuple(f"Simulated device {index}" for index in range(options.devices)),
    )


def _declared() -> Capabilities:
    try:
        return capabilities(simulated.Options.from_environment())
    except DrivetrainError:  # the probe says why; a spec can always be read
        return capabilities(simulated.Options())


def _load() -> Backend:
    from simulated_backend.backend import SimulatedBackend

    return SimulatedBackend()


spec = BackendSpec(
    name="sim",
    contract=ContractVersion(0, 1),
    capabilities=_declared(),
    facts=FACTS,
    strategies=("single_device", "ddp"),
    probe=_probe,
    load=_load,
    priority=10,  # above the CPU, below anything that computes by itself
)
