"""The IPU backend: a spec that loads neither torch nor PopTorch, for Graphcore IPUs.

PopTorch is at its end of life: its last release, 3.4, runs with torch 2.0.1 alone. So this package
needs nothing newer, and uses the toolkit only where it happens to be installed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    ConfigurationError,
    ContractVersion,
    DeviceFacts,
    Feature,
)

from drivetrain_ipu.probing import look

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend, Probe

__all__ = ["FACTS", "FEATURES", "PRECISIONS", "STRATEGY", "parse_replicas", "spec"]

STRATEGY = "ipu"

#: Tensors of the user never leave the host: the program takes them from there, and brings results
#: back. One process drives all its replicas, so that no launcher is needed.
FACTS = DeviceFacts(
    device_type="cpu",
    collective_backend="gloo",
    autocast_type="cpu",
    one_device_strategy=STRATEGY,
    several_devices_strategy=STRATEGY,
    several_devices_launcher="none",
    interactive_launcher="none",
    default_devices=1,
    indexed=False,
    own_strategies=True,
)

#: What a program that holds forward, backward and update can do. It calls no user code, and the
#: norm of its gradients stays inside, so that clipping is an option of the strategy.
FEATURES = frozenset({Feature.ACCUMULATION, Feature.SEVERAL_PROCESSES})

PRECISIONS = frozenset({"16-mixed", "16-true", "32-true"})


def parse_replicas(request: Any, probe: Probe, backend: str) -> tuple[int, ...]:
    """From ``devices=`` to one index for each replica of the model in this process.

    How many IPUs a replica takes depends on how the model is divided, so a number is not compared
    with what the probe found; the SDK refuses what is not there.

    Args:
        request: ``"auto"`` (one replica), ``-1`` (one for each IPU that was found), or a positive
            number or its digits.
        probe: What the machine has.
        backend: Name of the backend, for messages.

    Raises:
        ConfigurationError: The request is no positive number.
    """
    if request == "auto":
        return (0,)
    if request in (-1, "-1"):
        return tuple(range(max(probe.devices, 1)))
    number = int(request) if isinstance(request, str) and request.isdigit() else request
    if isinstance(number, int) and not isinstance(number, bool) and number > 0:
        return tuple(range(number))
    raise ConfigurationError(
        f"devices={request!r} was asked of the {backend!r} backend, where it is a number of "
        "replicas, which have no indices.",
        "Give a positive number, or 'auto' for one replica.",
    )


def _probe() -> Probe:
    return look(os.environ)


def _load() -> Backend:
    from drivetrain_ipu.backend import IpuBackend

    return IpuBackend()


spec = BackendSpec(
    name="ipu",
    contract=ContractVersion(0, 1),
    capabilities=Capabilities(features=FEATURES, precisions=PRECISIONS, hooks=frozenset()),
    facts=FACTS,
    strategies=(STRATEGY,),
    probe=_probe,
    load=_load,
    # The emulator is for trying things out: whoever wants a CPU means the backend for CPUs.
    priority=0 if os.environ.get("POPTORCH_IPU_MODEL") else 60,
    parse_devices=parse_replicas,
)
