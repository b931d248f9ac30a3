"""The generation of the device. Asking opens it."""

from __future__ import annotations

from enum import Enum

import fake_gaudi


class synDeviceType(Enum):
    synDeviceGaudi = 0
    synDeviceGaudi2 = 4
    synDeviceGaudi3 = 5


def _get_device_type():
    fake_gaudi.acquire("_get_device_type")
    digit = fake_gaudi.option("generation", "GAUDI2")[5:]
    return synDeviceType[f"synDeviceGaudi{digit}"]


def _is_fp16_supported():
    return _get_device_type() is not synDeviceType.synDeviceGaudi
