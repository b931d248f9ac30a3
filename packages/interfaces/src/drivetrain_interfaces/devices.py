"""From what a user writes in ``devices=`` to device indices. Pure and torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.errors import ConfigurationError

if TYPE_CHECKING:
    from drivetrain_interfaces.backend import Probe


def parse_devices(request: Any, probe: Probe, backend: str) -> tuple[int, ...]:
    """The indices that ``request`` means on a machine with ``probe.devices`` devices.

    Args:
        request: ``"auto"`` or ``-1`` (all), a positive number or its digits (the first so many), a
            sequence of indices or names, or the same separated by commas.
        probe: What the machine has.
        backend: Name of the backend, for messages.

    Raises:
        ConfigurationError: The request is malformed, empty, repeated, or more than there is.
    """
    found = f"The {backend!r} backend found {probe.devices} on this machine."
    if request in ("auto", -1, "-1"):
        return tuple(range(probe.devices))
    if isinstance(request, str) and "," in request:
        request = [part.strip() for part in request.split(",") if part.strip()]
    if isinstance(request, str) and request.lstrip("-").isdigit():
        request = int(request)
    if isinstance(request, str) and request in probe.names:
        request = [request]
    if isinstance(request, int) and not isinstance(request, bool):
        if not 0 < request <= probe.devices:
            raise ConfigurationError(
                f"devices={request!r} was asked for. {found}",
                f"Ask for 1 to {probe.devices}, or devices='auto'.",
            )
        return tuple(range(request))
    if isinstance(request, (list, tuple)):
        return _parse_list(request, probe, found)
    raise ConfigurationError(
        f"devices={request!r} is neither a number, a list of indices, nor 'auto'. {found}",
        "Give a number, a list such as [0, 1], or 'auto'.",
    )


def _parse_list(request: Any, probe: Probe, found: str) -> tuple[int, ...]:
    indices: list[int] = []
    for item in request:
        if isinstance(item, str) and item in probe.names:
            indices.append(probe.names.index(item))
        elif isinstance(item, bool) or not str(item).isdigit() or int(item) >= probe.devices:
            raise ConfigurationError(
                f"devices={request!r} contains {item!r}, which is no device. {found}",
                f"Use indices from 0 to {probe.devices - 1}.",
            )
        else:
            indices.append(int(item))
    if not indices or len(set(indices)) != len(indices):
        raise ConfigurationError(
            f"devices={request!r} is empty or names a device twice. {found}",
            "Name every device once.",
        )
    return tuple(indices)
