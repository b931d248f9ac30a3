"""What is missing before PopTorch can run here, found out without importing or opening anything."""

from __future__ import annotations

import os
import re
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_interfaces import Probe

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The torch that each SDK was built for (their release notes). 3.4 is the last one.
TORCH = {
    "3.4": "2.0.1",
    "3.3": "2.0.1",
    "3.2": "1.13.1",
    "3.1": "1.13.0",
    "3.0": "1.10.0",
    "2.6": "1.10.0",
    "2.5": "1.10.0",
    "2.4": "1.10.0",
}
_GRAPHCORE = "0x1d95"
_DEVICES, _PCI, _PROCESSES = Path("/dev"), Path("/sys/bus/pci/devices"), Path("/proc")
_EMULATOR = ("POPTORCH_IPU_MODEL", "POPTORCH_SMALL_IPU_MODEL")
_PARTITION = ("IPUOF_VIPU_API_PARTITION_ID", "IPUOF_CONFIG_PATH")
_NODE = re.compile(r"ipu\d+$")


def look(
    env: Mapping[str, str],
    devices: Path = _DEVICES,
    pci: Path = _PCI,
    processes: Path = _PROCESSES,
) -> Probe:
    """What this machine has, by its packages, its variables, device files and PCI bus.

    Args:
        env: The environment of this process.
        devices: The folder of device files.
        pci: The folder in which the kernel lists PCI devices.
        processes: The folder in which the kernel lists processes, to find who holds a device.
    """
    fault = _installation()
    if fault:
        return Probe(0, fault)
    if any(env.get(name) for name in _EMULATOR):
        return Probe(1, names=("IPU Model (emulator)",))
    if env.get("POPDIST_NUM_LOCAL_REPLICAS"):
        return _of_poprun(env)
    for name in _PARTITION:
        if env.get(name):
            return Probe(1, names=(f"IPU partition {env[name]}",))
    try:
        return _local(devices, pci, processes)
    except OSError as error:
        return Probe(0, f"{error.filename} cannot be read: {error.strerror}")


def _installation() -> str:
    """What is wrong with the packages; empty if nothing is."""
    if util.find_spec("poptorch") is None:
        return (
            "poptorch is not installed. It is part of Graphcore's Poplar SDK (3.4 is the last), "
            "which the vendor offers for download; install its poptorch wheel"
        )
    try:
        version = metadata.version("poptorch")
        there = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed as a package. Install its wheel"
    if (wanted := _torch_for(version)) and there.partition("+")[0] != wanted:
        return (
            f"poptorch {version} works with torch {wanted} only, and torch {there} is "
            f"installed. Install torch=={wanted} in an environment of its own"
        )
    return ""


def _torch_for(version: str) -> str:
    """The torch that a PopTorch needs, by its own metadata or by its version; empty if any."""
    for requirement in metadata.requires("poptorch") or []:
        if match := re.match(r"torch\s*(?:\(?==\s*([\d.]+)\)?)?\s*(?:;|$)", requirement):
            return match.group(1) or ""
    return TORCH.get(".".join(version.split(".")[:2]), "")


def _of_poprun(env: Mapping[str, str]) -> Probe:
    words = [env["POPDIST_NUM_LOCAL_REPLICAS"], env.get("POPDIST_NUM_IPUS_PER_REPLICA", "1")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        return Probe(0, f"poprun's variables say {' x '.join(words)} IPUs. Start it again")
    count = int(words[0]) * int(words[1])
    return Probe(count, names=tuple(f"IPU {n} of poprun" for n in range(count)))


def _local(devices: Path, pci: Path, processes: Path) -> Probe:
    nodes = sorted(
        (path for path in devices.glob("ipu*") if _NODE.match(path.name)),
        key=lambda path: int(path.name[3:]),
    )
    if not nodes:
        cards = _cards(pci)
        if cards:
            return Probe(
                0,
                f"{cards} Graphcore devices are on the PCI bus, and the driver made no "
                f"{devices}/ipu0. Install and load the driver of the Poplar SDK",
            )
        return Probe(
            0,
            "no IPU is here: neither a device file, nor a V-IPU partition in the variables. Set "
            "IPUOF_VIPU_API_PARTITION_ID (with host and port), or POPTORCH_IPU_MODEL=1 to try the "
            "emulator",
        )
    forbidden = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if forbidden:
        return Probe(0, f"{forbidden[0]} may not be opened by this user. Ask for its group")
    busy = holders(nodes, processes)
    free = [node for node in nodes if str(node) not in busy]
    if not free:
        node, process = next(iter(busy.items()))
        return Probe(
            0,
            f"all {len(nodes)} IPUs are busy: process {process} holds {node}. Wait for it, or end "
            "it",
        )
    return Probe(len(free), names=tuple(node.name for node in free))


def holders(nodes: list[Path], processes: Path) -> dict[str, str]:
    """Which of these device files other processes hold, and which process, as far as one may see.

    Args:
        nodes: Device files.
        processes: Where the kernel lists processes.
    """
    wanted = {str(node) for node in nodes}
    found: dict[str, str] = {}
    for folder in processes.glob("[0-9]*/fd"):
        process = folder.parent.name
        if process == str(os.getpid()) or not os.access(folder, os.R_OK | os.X_OK):
            continue
        try:
            targets = [os.readlink(entry.path) for entry in os.scandir(folder)]
        except OSError:  # it ended just now, or is another user's
            continue
        found.update({target: process for target in targets if target in wanted})
    return found


def _cards(pci: Path) -> int:
    """Graphcore devices on the bus."""
    if not pci.is_dir():
        return 0
    vendors = [entry / "vendor" for entry in pci.iterdir()]
    return sum(
        os.access(path, os.R_OK) and path.read_text("ascii").strip() == _GRAPHCORE
        for path in vendors
    )
