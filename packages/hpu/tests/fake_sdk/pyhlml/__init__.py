"""Telemetry of the fake modules, which opens none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fake_gaudi

_STARTED: list[int] = []
_TOTAL = 96 * 2**30


class HLMLError(Exception):
    pass


def hlmlInit() -> None:
    if fake_gaudi.option("no_driver", False):
        raise HLMLError("Driver not loaded")
    _STARTED.append(1)


def hlmlInitWithFlags(flags: int = 0) -> None:
    hlmlInit()


def hlmlShutdown() -> None:
    _STARTED.pop()


def hlmlDeviceGetCount() -> int:
    assert _STARTED, "hlmlInit comes first"
    return fake_gaudi.cards()


def hlmlDeviceGetHandleByIndex(index: int) -> Any:
    return SimpleNamespace(index=index)


def hlmlDeviceGetName(device: Any) -> bytes:
    return f"HL-2{device.index}5".encode()


def hlmlDeviceGetModuleID(device: Any) -> int:
    return int(device.index)


def hlmlDeviceGetMemoryInfo(device: Any) -> Any:
    used = _TOTAL - 2**20 if fake_gaudi.is_held(str(device.index)) else 2**29
    return SimpleNamespace(free=_TOTAL - used, total=_TOTAL, used=used)
