"""The CUDA backend: a spec that loads no torch. The rest loads when the backend is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    ConfigurationError,
    ContractVersion,
    DeviceFacts,
    Feature,
    Probe,
)
from drivetrain_interfaces.devices import parse_devices
from drivetrain_toolkit.specs import DDP_FEATURES, PRECISIONS

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

__all__ = ["CAPABILITIES", "FACTS", "parse_cuda_devices", "spec"]

#: At a prompt processes are forked, because a spawned one cannot see what was defined there. That
#: works as long as this process has no CUDA context, which the launcher checks.
FACTS = DeviceFacts(
    device_type="cuda",
    collective_backend="nccl",
    autocast_type="cuda",
    one_device_strategy="single_device",
    several_devices_strategy="ddp",
    several_devices_launcher="script",
    interactive_launcher="fork",
    default_devices=0,
    indexed=True,
    eager=True,
)
_PREFIXES = ("GPU-", "MIG-")


def parse_cuda_devices(request: Any, probe: Probe, backend: str) -> tuple[int, ...]:
    """From ``devices=`` to indices: as everywhere, and by the beginning of a UUID.

    Args:
        request: As for ``drivetrain_interfaces.devices.parse_devices``; ``"GPU-8932f937"`` and
            ``"MIG-…"`` mean the visible device whose UUID begins so.
        probe: What the machine has.
        backend: Name of the backend, for messages.

    Raises:
        ConfigurationError: The request cannot be met; or a UUID fits none or several devices.
    """
    if isinstance(request, str) and request.strip().startswith(_PREFIXES):
        request = [part.strip() for part in request.split(",") if part.strip()]
    if isinstance(request, (list, tuple)):
        request = [_index(item, probe, backend) for item in request]
    return parse_devices(request, probe, backend)


def _index(item: Any, probe: Probe, backend: str) -> Any:
    if not isinstance(item, str) or not item.startswith(_PREFIXES):
        return item
    uuids = [name.rpartition(" ")[2] for name in probe.names]
    fitting = [index for index, uuid in enumerate(uuids) if uuid.startswith(item)]
    if len(fitting) != 1:
        known = ", ".join(uuid for uuid in uuids if uuid.startswith(_PREFIXES))
        raise ConfigurationError(
            f"devices= names {item!r}, which begins the UUID of {len(fitting) or 'no'} visible "
            f"devices of the {backend!r} backend (known: {known or 'none'}).",
            "Give one of these, or an index. Where models differ, set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, so that UUIDs can be told.",
        )
    return fitting[0]


def _probe() -> Probe:
    from drivetrain_cuda.probing import probe

    return probe()


def _load() -> Backend:
    from drivetrain_cuda.backend import CudaBackend

    return CudaBackend()


#: What every board can do, and ``"fp8"``, which older ones refuse by name when it is asked for.
CAPABILITIES = Capabilities(
    features=DDP_FEATURES | {Feature.SYNC_BATCHNORM}, precisions=PRECISIONS | {"fp8"}
)

spec = BackendSpec(
    name="cuda",
    contract=ContractVersion(0, 1),
    capabilities=CAPABILITIES,
    facts=FACTS,
    strategies=("single_device", "ddp"),
    probe=_probe,
    load=_load,
    priority=50,
    parse_devices=parse_cuda_devices,
)
