"""One family of devices. Knows nothing of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Every fact of a device family that the core needs, so that no core table names a vendor.

    Attributes:
        device_type: The ``torch.device`` type, such as ``"cpu"``.
        collective_backend: Name of the ``torch.distributed`` backend.
        autocast_type: The device type that ``torch.autocast`` wants.
        one_device_strategy: The strategy for one device.
        several_devices_strategy: The strategy for several devices.
        several_devices_launcher: The launcher for several devices when a script is being run.
        interactive_launcher: The same at a prompt or in a notebook.
        default_devices: How many devices ``"auto"`` means; 0 means all that the probe found.
        indexed: Whether devices have an index (``acme:1``) or not (``cpu``).
        eager: Whether torch runs these devices operation by operation and ``torch.distributed``
            serves them, so that a strategy that was written for ``EAGER`` devices works here.
        own_strategies: Whether only the backend's own strategies run here, whatever others say of
            the device type: where tensors are on the host and what computes is somewhere else.
        process_launcher: Where ``several_devices_launcher`` is ``"none"``, the launcher of those
            strategies that want a process for each device all the same; empty if there is none.
    """

    device_type: str
    collective_backend: str
    autocast_type: str
    one_device_strategy: str = "single_device"
    several_devices_strategy: str = "ddp"
    several_devices_launcher: str = "script"
    interactive_launcher: str = "spawn"
    default_devices: int = 0
    indexed: bool = True
    eager: bool = False
    own_strategies: bool = False
    process_launcher: str = ""


@runtime_checkable
class Accelerator(Protocol):
    """Counts and activates the devices of one family."""

    @property
    def facts(self) -> DeviceFacts:
        """What the family is like; the same object as in the backend's spec."""
        ...

    @property
    def device_type(self) -> str:
        """The ``torch.device`` type, such as ``"cpu"``."""
        ...

    def device_count(self) -> int:
        """Devices that this process may use. Opens none of them."""
        ...

    def activate(self, index: int, local_size: int) -> torch.device:
        """Make device ``index`` current for this process, one of ``local_size`` on this machine."""
        ...

    def synchronize(self, device: torch.device) -> None:
        """Return once all work queued on ``device`` has finished."""
        ...

    def close(self) -> None:
        """Release what ``activate`` acquired. Safe to call twice."""
        ...


@runtime_checkable
class SupportsMemoryStats(Protocol):
    """An accelerator that can say how much memory is in use."""

    def memory_stats(self, device: torch.device) -> Mapping[str, float]:
        """Numbers by name, in bytes; at least ``"allocated"`` and ``"peak"``."""
        ...


@runtime_checkable
class SupportsRng(Protocol):
    """An accelerator with a random number generator of its own, besides torch's on the host."""

    def rng_state(self, device: torch.device) -> Any:
        """The state, as a uint8 tensor on the host."""
        ...

    def set_rng_state(self, state: Any, device: torch.device) -> None:
        """Restore a state."""
        ...


@runtime_checkable
class SupportsStreams(Protocol):
    """An accelerator whose devices can copy and compute at the same time."""

    def copy_stream(self, device: torch.device) -> torch.Stream:
        """A stream of ``device`` besides the current one; the same one each time."""
        ...
