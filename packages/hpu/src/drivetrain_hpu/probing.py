"""What this machine has, found out without opening a device and without importing the bridge.

Installed versions and the driver are looked at. Where a release is newer than what is known here,
another process imports the bridge and says how that went.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import ConfigurationError, Probe
from drivetrain_toolkit.elsewhere import count_elsewhere

from drivetrain_hpu import telemetry
from drivetrain_hpu.bridge import BRIDGE, MODE, device_module, is_loaded
from drivetrain_hpu.modules import VISIBLE, visible_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Torch by release of the Gaudi software, as far as the vendor's tables were seen.
TORCH_OF: Final = {
    "1.16": "2.2", "1.17": "2.3", "1.18": "2.4", "1.19": "2.5", "1.20": "2.6", "1.21": "2.6",
    "1.22": "2.7", "1.23": "2.9", "1.24.0": "2.10", "1.24.1": "2.11",
}  # fmt: skip
_PACKAGE: Final = "habana-torch-plugin"
#: Where a loaded driver and its devices show.
_DRIVER: Final = Path("/sys/module/habanalabs")
_NODES: Final = (("/dev/accel", "accel[0-9]*"), ("/dev", "hl[0-9]*"))
#: Seconds for a fresh interpreter to import torch and the bridge from a cold disk.
TIMEOUT_S: Final = 180.0
_QUESTION: Final = f"""
import os
os.environ.setdefault({MODE!r}, "0")
try:
    import torch
    import {BRIDGE}
    print("devices", torch.hpu.device_count())
except Exception as error:
    lines = str(error).strip().splitlines()
    print("fault", type(error).__name__ + (": " + lines[0] if lines else ""))
"""


@dataclass(frozen=True, slots=True)
class Installation:
    """The packages, as their files tell.

    Attributes:
        bridge: Whether Intel's bridge is there.
        release: Of the Gaudi software; empty where its package does not say.
        torch: Version of torch; empty without it.
    """

    bridge: bool
    release: str
    torch: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the system shows: whether the driver is loaded, and how many devices it made."""

    driver: bool
    nodes: int


def probe(env: Mapping[str, str]) -> Probe:
    """What a process with these variables may use. Never raises, and opens no device."""
    if is_loaded():
        count = int(device_module().device_count())
        return Probe(count, "" if count else "the Gaudi bridge is loaded and sees no device")
    return look(env, installation(), kernel(), telemetry.ask, ask_bridge)


def look(
    env: Mapping[str, str],
    found: Installation,
    system: Kernel,
    ask_driver: Callable[[], tuple[telemetry.Card, ...]],
    ask: Callable[[Mapping[str, str]], int | str],
) -> Probe:
    """What a process with these variables may use.

    Args:
        env: Its variables.
        found: The installed packages.
        system: What the kernel shows.
        ask_driver: Lists the modules; may raise ``NoAnswer``.
        ask: Imports the bridge in another process; returns how many devices it sees, or a fault.
    """
    if fault := packages_fault(env, found):
        return Probe(0, fault)
    try:
        cards = ask_driver()
    except telemetry.NoAnswer as error:
        return _without_telemetry(env, system, str(error), ask)
    try:
        seen = _seen(env, cards)
    except ConfigurationError as error:
        return Probe(0, str(error))
    fault = _cards_fault(env, cards, seen)
    if not fault and _known_torch(found.release) is None:
        fault = _import_fault(env, ask)
    if fault:
        return Probe(0, fault)
    return Probe(len(seen), names=tuple(f"{card.name} module {card.module}" for card in seen))


def _cards_fault(
    env: Mapping[str, str], cards: tuple[telemetry.Card, ...], seen: tuple[telemetry.Card, ...]
) -> str:
    """Why none of the modules can be used; empty if one can."""
    if not cards:
        return "the driver answers and lists no Gaudi module. Attach one to this machine"
    if not seen:
        have = ", ".join(str(card.module) for card in cards)
        return f"{VISIBLE}={env.get(VISIBLE)!r} names none of the modules {have}. Correct it"
    if all(card.busy for card in seen):
        return (
            f"all {len(seen)} Gaudi modules that this process may use are busy: their memory is "
            "held by other processes. Look with hl-smi, and end those or wait"
        )
    return ""


def packages_fault(env: Mapping[str, str], found: Installation) -> str:
    """What is wrong with the installed packages; empty if nothing is known to be."""
    if not found.bridge:
        return (
            f"the Gaudi software is not installed: there is no package {BRIDGE}. Install Intel's "
            "Gaudi software with its PyTorch packages"
        )
    if not found.torch:
        return "torch is not installed. Install the build of torch that comes with Gaudi software"
    public, _, local = found.torch.partition("+")
    wanted = _known_torch(found.release)
    if wanted is not None and ".".join(public.split(".")[:2]) != wanted:
        return (
            f"Gaudi software {found.release} is built for torch {wanted}, and torch {found.torch} "
            "is installed. Install Intel's build of that torch"
        )
    if not local:
        return (
            f"torch {found.torch} names no build, for which the bridge fails with an "
            "AttributeError. Install Intel's build of torch, whose version ends in +git…"
        )
    if not local.startswith("git") and env.get(MODE, "0") != "0":
        return (
            f"torch {found.torch} is not Intel's build, which lazy mode ({MODE}={env[MODE]}) "
            f"needs. Install that, or set {MODE}=0"
        )
    return ""


def installation() -> Installation:
    """The packages of this interpreter. Imports none of them."""
    bridge = _is_there("habana_frameworks")
    try:
        release = metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        release = ""
    return Installation(bridge, release, _torch_version())


def kernel(driver: Path = _DRIVER, nodes: tuple[tuple[str, str], ...] = _NODES) -> Kernel:
    """What the system shows of the driver and its devices."""
    return Kernel(
        driver.exists(), max(len(list(Path(folder).glob(form))) for folder, form in nodes)
    )


def ask_bridge(env: Mapping[str, str]) -> int | str:
    """How many devices the bridge counts in another process, or what went wrong there."""
    return count_elsewhere(_QUESTION, env, TIMEOUT_S)


def _without_telemetry(
    env: Mapping[str, str],
    system: Kernel,
    why: str,
    ask: Callable[[Mapping[str, str]], int | str],
) -> Probe:
    if not system.driver and not system.nodes:
        return Probe(
            0,
            "there is no sign of the Gaudi driver: the kernel module habanalabs is not loaded and "
            f"there is no device node ({why}). Install the driver, or pass the devices to this "
            "container",
        )
    if not system.nodes:
        return Probe(
            0,
            "the Gaudi driver is loaded, and there is no device node under /dev. Attach a device, "
            "or pass it to this container",
        )
    answer = ask(env)
    if isinstance(answer, str):
        return Probe(0, _broken(answer))
    if not answer:
        return Probe(
            0,
            f"{system.nodes} Gaudi device nodes are there, and the bridge sees none of them with "
            f"{VISIBLE}={env.get(VISIBLE, '')!r}. Correct that, or the rights on the nodes",
        )
    return Probe(answer)


def _seen(env: Mapping[str, str], cards: tuple[telemetry.Card, ...]) -> tuple[telemetry.Card, ...]:
    if not env.get(VISIBLE, "").strip():
        return cards
    by_module = {str(card.module): card for card in cards}
    named = visible_modules(env, len(cards))
    return tuple(by_module[name] for name in named if name in by_module)


def _import_fault(env: Mapping[str, str], ask: Callable[[Mapping[str, str]], int | str]) -> str:
    answer = ask(env)
    if isinstance(answer, str):
        return _broken(answer)
    return "" if answer else "the Gaudi bridge imports, and sees no device. Look with hl-smi"


def _broken(fault: str) -> str:
    return (
        f"the Gaudi bridge was imported in another process, and {fault}. Install torch and the "
        "Gaudi software of one release"
    )


def _known_torch(release: str) -> str | None:
    numbers = re.findall(r"\d+", release)
    return TORCH_OF.get(".".join(numbers[:3])) or TORCH_OF.get(".".join(numbers[:2]))


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _torch_version() -> str:
    """Read from torch's files, since importing it may import the bridge."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ""
    path = Path(spec.submodule_search_locations[0]) / "version.py"
    if not os.access(path, os.R_OK):
        return ""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        named = [target.id for target in targets if isinstance(target, ast.Name)]
        value = getattr(node, "value", None)
        if named == ["__version__"] and isinstance(value, ast.Constant):
            return str(value.value)
    return ""
