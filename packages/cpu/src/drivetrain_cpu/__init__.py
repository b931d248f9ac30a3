"""The CPU backend: a spec that loads no torch. The rest loads when the backend is chosen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    ConfigurationError,
    ContractVersion,
    DeviceFacts,
    Probe,
)
from drivetrain_toolkit.specs import DDP_FEATURES, PRECISIONS

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend

__all__ = ["FACTS", "cores", "spec"]

#: ``default_devices`` is 1: a process already uses every core, so more must be asked for.
#: At a prompt processes are forked, because a spawned one cannot see what was defined there.
FACTS = DeviceFacts(
    device_type="cpu",
    collective_backend="gloo",
    autocast_type="cpu",
    one_device_strategy="single_device",
    several_devices_strategy="ddp",
    several_devices_launcher="script",
    interactive_launcher="fork",
    default_devices=1,
    indexed=False,
    eager=True,
)


def cores() -> int:
    """Cores that this process may run on: a container or ``taskset`` may allow fewer than exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_processes(request: Any, probe: Probe, backend: str) -> tuple[int, ...]:
    """From ``devices=`` to one index per process. A CPU is one device that any number can share.

    Args:
        request: ``"auto"`` or ``-1`` (one process), or a positive number or its digits, which may
            exceed the number of cores.
        probe: What the machine has, for messages.
        backend: Name of the backend, for messages.

    Raises:
        ConfigurationError: The request is no positive number, or a list: cores have no indices.
    """
    if request in ("auto", -1, "-1"):
        return (0,)
    number = int(request) if isinstance(request, str) and request.isdigit() else request
    if isinstance(number, int) and not isinstance(number, bool) and number > 0:
        return tuple(range(number))
    raise ConfigurationError(
        f"devices={request!r} was asked of the {backend!r} backend, where it is a number of "
        f"processes; this machine has {probe.devices} cores, which have no indices.",
        "Give a positive number, or 'auto' for one process.",
    )


def _probe() -> Probe:
    return Probe(devices=cores())


def _load() -> Backend:
    from drivetrain_cpu.backend import CpuBackend

    return CpuBackend()


spec = BackendSpec(
    name="cpu",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(features=DDP_FEATURES, precisions=PRECISIONS),
    facts=FACTS,
    strategies=("single_device", "ddp"),
    probe=_probe,
    load=_load,
    priority=0,  # every machine has one, so "auto" takes it only when nothing else is there
    parse_devices=parse_processes,
)
