"""The compiled library, as Python sees it: numbers by name."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Native:
    """Options and counters inside the library.

    Args:
        path: The library.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        library.drivetrain_sim_get.restype = ctypes.c_int64
        library.drivetrain_sim_get.argtypes = (ctypes.c_char_p, ctypes.c_int)
        library.drivetrain_sim_set.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int64)
        self._library = library

    def register(
        self, device_type: str, key: str = "PrivateUse1", hooks: Path | None = None
    ) -> None:
        """Register the device with torch, once in a process.

        Args:
            device_type: What torch calls it now: its type for others, or one of its own.
            key: What torch dispatches that type by.
            hooks: The library with the hooks of a type of its own.
        """
        missing = self._library.drivetrain_sim_register(device_type.encode(), key.encode())
        assert not missing, f"torch knows no device type {device_type!r}"
        if hooks is not None:
            ctypes.CDLL(str(hooks), mode=ctypes.RTLD_GLOBAL)

    @property
    def most_devices(self) -> int:
        """How many devices there may be."""
        return int(self._library.drivetrain_sim_max_devices())

    def get(self, name: str, device: int = 0) -> int:
        """The number of that name, of one device where every device has its own."""
        value = int(self._library.drivetrain_sim_get(name.encode(), device))
        assert value >= 0, f"no {name!r} of device {device}"
        return value

    def set(self, name: str, value: int, device: int = 0) -> None:
        """Set the number of that name."""
        missing = self._library.drivetrain_sim_set(name.encode(), device, value)
        assert not missing, f"no {name!r} of device {device}"
