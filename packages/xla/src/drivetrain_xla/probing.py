"""Which devices torch_xla would open, found out without opening, or importing, anything."""

from __future__ import annotations

import os
import re
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_interfaces import Probe

if TYPE_CHECKING:
    from collections.abc import Mapping

_GOOGLE = "0x1ae0"
#: PCI device ids of TPU chips, and how many devices a chip is
#: (torch_xla 2.9, ``torch_xla/_internal/tpu.py``).
_CHIPS = {
    "0x0027": 2,  # v2, v3
    "0x005e": 1,  # v4
    "0x0062": 1,  # v5p
    "0x0063": 1,  # v5e
    "0x006f": 1,  # v6e
    "0x0076": 1,  # 7x
}
_PCI = Path("/sys/bus/pci/devices")
_TRY = "Set PJRT_DEVICE=CPU to try torch_xla on the CPU"


def look(env: Mapping[str, str], pci: Path = _PCI) -> Probe:
    """What this machine has, by its installed packages, its variables and its PCI bus.

    Args:
        env: The environment of this process.
        pci: The folder in which the kernel lists PCI devices.
    """
    fault = _installation()
    if fault:
        return Probe(0, fault)
    wanted = env.get("PJRT_DEVICE", "")
    if wanted in {"", "TPU"}:
        return _chip_devices(env, pci)
    if wanted == "CPU":
        return _host_devices(env)
    return Probe(
        0, f"PJRT_DEVICE={wanted!r} is set, and drivetrain-xla is for 'TPU' (and 'CPU' to try)"
    )


def _chip_devices(env: Mapping[str, str], pci: Path) -> Probe:
    try:
        chips = _chips(pci)
    except OSError as error:
        return Probe(0, f"{pci} cannot be read: {error.strerror or error}")
    visible = env.get("TPU_VISIBLE_CHIPS") or env.get("TPU_VISIBLE_DEVICES")
    if visible:
        chips = chips[: len([part for part in visible.split(",") if part.strip()])]
    if not chips:
        return Probe(0, f"no TPU is on the PCI bus. {_TRY}")
    if util.find_spec("libtpu") is None and not env.get("TPU_LIBRARY_PATH"):
        return Probe(
            0, f"{len(chips)} TPU chips are there, and libtpu is not. Install drivetrain-xla[tpu]"
        )
    count = sum(chips)
    return Probe(count, names=tuple(f"TPU:{n}" for n in range(count)))


def _installation() -> str:
    """What is wrong with the packages; empty if nothing is."""
    if util.find_spec("torch_xla") is None:
        return "torch_xla is not installed. Install torch_xla[tpu] and torch of one version"
    versions = {}
    try:
        for name in ("torch", "torch_xla"):
            versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed as a package. Install it"
    mine, theirs = (re.split(r"[.+]", versions[name])[:2] for name in ("torch_xla", "torch"))
    if mine != theirs:
        return (
            f"torch_xla {versions['torch_xla']} is built for torch {'.'.join(mine)}, and torch "
            f"{versions['torch']} is installed. Install both in one version"
        )
    return ""


def _host_devices(env: Mapping[str, str]) -> Probe:
    text = env.get("CPU_NUM_DEVICES", "1")
    if not (text.isascii() and text.isdigit() and int(text)):
        return Probe(0, f"CPU_NUM_DEVICES={text!r} is set, which is no positive number")
    return Probe(int(text), names=tuple(f"CPU:{n}" for n in range(int(text))))


def _chips(pci: Path) -> list[int]:
    """How many devices each TPU chip on the bus is."""
    found = []
    for entry in sorted(pci.iterdir()) if pci.is_dir() else ():
        vendor, device = entry / "vendor", entry / "device"
        if not (os.access(vendor, os.R_OK) and os.access(device, os.R_OK)):
            continue
        if vendor.read_text("ascii").strip() == _GOOGLE:
            devices = _CHIPS.get(device.read_text("ascii").strip())
            found += [devices] if devices else []
    return found
