"""What this machine has, without a CUDA context and without importing torch.

NVML is asked first. Where it cannot tell, a subprocess asks torch, so that this process stays
without a context and can still fork.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_interfaces import Probe
from drivetrain_toolkit.elsewhere import count_elsewhere

from drivetrain_cuda import nvml
from drivetrain_cuda.visible import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
#: Seconds for a fresh interpreter to import torch and count; a cold disk may take half of it.
TIMEOUT_S = 120.0
#: Any of these says that some driver may be there: NVIDIA's, the one of WSL, or AMD's.
DRIVER_PATHS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
_QUESTION = "import torch; print('devices', torch.cuda.device_count())"
_INSTALL = "See https://pytorch.org/get-started/locally"


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What the installed torch was built for.

    Attributes:
        version: Of torch.
        cuda: Of CUDA, such as ``"12.6"``; None without it.
        hip: Of AMD's counterpart; None without it.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None


def torch_build() -> TorchBuild | None:
    """The build of torch, read from its files; None if it is not installed. Imports nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "version.py"
    return read_build(path.read_text(encoding="utf-8")) if path.exists() else None


def read_build(text: str) -> TorchBuild:
    """The build that the text of torch's ``version.py`` states."""
    found: dict[str, str | None] = {}
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
            found[target.id] = node.value.value if isinstance(node.value.value, str) else None
    return TorchBuild(found.get("__version__") or "", found.get("cuda"), found.get("hip"))


def probe() -> Probe:
    """What this process may use. Never raises, and opens no device."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return Probe(devices=int(torch.cuda.device_count()))  # nothing is opened by asking now
    return look(os.environ, torch_build(), nvml.ask, ask_torch)


def look(
    env: Mapping[str, str],
    build: TorchBuild | None,
    ask_nvml: Callable[[], nvml.Driver],
    ask_torch: Callable[[Mapping[str, str]], int | str],
) -> Probe:
    """What a process with these variables may use.

    Args:
        env: Its variables.
        build: The installed torch.
        ask_nvml: Asks the driver; may raise ``NoAnswer``.
        ask_torch: Counts devices in another process; returns why it could not, if so.
    """
    if build is None:
        return Probe(0, "torch is not installed. Install torch with CUDA")
    if build.hip is not None:
        return _asked(ask_torch, env, f"torch {build.version} is built for ROCm {build.hip}")
    try:
        driver = ask_nvml()
    except nvml.NoAnswer as error:
        return _without_nvml(env, build, error, ask_torch)
    return _told(env, build, driver)


def _told(env: Mapping[str, str], build: TorchBuild, driver: nvml.Driver) -> Probe:
    found = f"driver {driver.version} with {_count(len(driver.cards))} was found"
    seen = visible(driver.cards, env.get(VISIBLE), env.get(ORDER))
    if build.cuda is None:
        reason = f"torch {build.version} is built without CUDA. {_INSTALL} for one with CUDA"
    elif driver.cuda[0] < int(build.cuda.split(".", maxsplit=1)[0]):
        reason = (
            f"it serves CUDA up to {driver.cuda[0]}.{driver.cuda[1]}, while torch {build.version} "
            f"is built for {build.cuda}. Upgrade the driver, or install a torch for that CUDA"
        )
    elif seen.names:
        return Probe(len(seen.names), names=seen.names)
    elif not driver.cards:
        reason = "nothing more. Attach a device to this machine or container"
    else:
        reason = _hidden(env.get(VISIBLE), seen.why)
    return Probe(0, f"{found}, and {reason}")


def _hidden(variable: str | None, why: str) -> str:
    if variable is None:
        return f"{why}. Create one with nvidia-smi mig, or turn MIG mode off"
    return f"{VISIBLE}={variable!r} leaves none: {why}. Correct or unset it"


def _without_nvml(
    env: Mapping[str, str],
    build: TorchBuild,
    error: nvml.NoAnswer,
    ask_torch: Callable[[Mapping[str, str]], int | str],
) -> Probe:
    if build.cuda is None:
        return Probe(
            0,
            f"{error}, and torch {build.version} is built without CUDA. Install an NVIDIA driver, "
            "and a torch with CUDA",
        )
    if error.absent:
        return Probe(0, f"{error}, so there is no NVIDIA driver. Install one")
    if not _driver_may_be_there():
        return Probe(0, f"{error}, and there is no sign of an NVIDIA driver. Install one")
    return _asked(ask_torch, env, str(error))


def _driver_may_be_there() -> bool:
    return sys.platform != "linux" or any(Path(path).exists() for path in DRIVER_PATHS)


def _asked(
    ask_torch: Callable[[Mapping[str, str]], int | str], env: Mapping[str, str], why: str
) -> Probe:
    answer = ask_torch(env)
    if isinstance(answer, str):
        return Probe(0, f"{why}; torch was asked in another process, and {answer}")
    if not answer:
        return Probe(0, f"{why}; torch was asked in another process, and found no device")
    return Probe(answer)


def ask_torch(env: Mapping[str, str]) -> int | str:
    """How many devices torch counts in another process, or why it did not."""
    return count_elsewhere(_QUESTION, env, TIMEOUT_S)


def _count(number: int) -> str:
    return f"{number} device" if number == 1 else f"{number} devices"
