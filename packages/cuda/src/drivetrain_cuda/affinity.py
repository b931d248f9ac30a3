"""The cores that are nearest to a device, from the kernel's files. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: Where Linux lists what is on the PCI bus.
PCI: Final = Path("/sys/bus/pci/devices")


def cores_near(bus: str, root: Path = PCI) -> frozenset[int]:
    """The cores of the memory node that a device hangs on; empty where the kernel does not say.

    Args:
        bus: The PCI address as NVML writes it, ``"00000000:3B:00.0"``.
        root: Where the kernel lists devices.
    """
    domain, _, rest = bus.lower().partition(":")
    path = root / f"{domain[-4:]}:{rest}" / "local_cpulist"
    if not rest or not path.exists():
        return frozenset()
    return read_list(path.read_text(encoding="ascii"))


def read_list(text: str) -> frozenset[int]:
    """From the kernel's way of writing sets, ``"0-3,8,10-11"``, to numbers."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.strip():
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
