"""Importing Intel's bridge between torch and Gaudi, whose import changes the whole process."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces import UnavailableError

from drivetrain_hpu.modules import MODULE, VISIBLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import World

BRIDGE: Final = "habana_frameworks.torch"
#: 0 is eager mode, anything else lazy mode. The bridge reads it once, when it is imported.
MODE: Final = "PT_HPU_LAZY_MODE"
#: What the import may raise: a missing part, another torch, a torch of no fork, a missing library.
FAILURES: Final = (ImportError, AssertionError, AttributeError, OSError, RuntimeError)
#: Variables that the import sets by its own guess. A later search for a free port would take the
#: port for the user's, and a later choice of a module would find one chosen.
_GUESSED: Final = ("MASTER_ADDR", "MASTER_PORT", MODULE)


def is_loaded() -> bool:
    """Whether this process has imported the bridge."""
    return BRIDGE in sys.modules


def is_open() -> bool:
    """Whether this process has opened a device. Opens none."""
    if not is_loaded():
        return False
    return bool(device_module().is_initialized())


def device_module() -> Any:
    """``torch.hpu``, which exists once the bridge is loaded."""
    import torch

    return torch.get_device_module("hpu")


def load_bridge() -> None:
    """Import the bridge, in eager mode unless the user says otherwise. Opens no device.

    Raises:
        UnavailableError: It does not import; says what is wrong and what to do.
    """
    if is_loaded():
        return
    before = {name: os.environ.get(name) for name in _GUESSED}
    os.environ.setdefault(MODE, "0")
    try:
        import_module(BRIDGE)
    except FAILURES as error:
        raise UnavailableError(
            f"The Gaudi bridge ({BRIDGE}) was to be imported, and {described(error)}.",
            advice(error),
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def described(error: BaseException) -> str:
    """``AssertionError: the first line of its text``."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0].rstrip('.')}" if lines else f"it raised {name}"


def advice(error: BaseException) -> str:
    """What to do about an import that failed."""
    if isinstance(error, AssertionError | AttributeError):
        return (
            "Install the torch that was built for this release of the Gaudi software: Intel's own "
            "build, whose version ends in +git and a hash."
        )
    if isinstance(error, OSError) and not isinstance(error, ImportError):
        return (
            "Install the Gaudi software of the same release, and set GC_KERNEL_PATH and "
            "HABANA_SCAL_BIN_PATH as its installer does."
        )
    return "Install the Gaudi software with its PyTorch packages, in one release."


def is_lazy() -> bool:
    """Whether operations wait until they are asked for. By the bridge's word, after its import.

    The variable alone would not tell: what it means when it is unset changed between releases.
    """
    internal: Any = import_module(f"{BRIDGE}.utils.internal")
    return bool(internal.is_lazy())


def core() -> Any:
    """The module ``habana_frameworks.torch.core``."""
    return import_module(f"{BRIDGE}.core")


def join(world: World) -> Mapping[str, str | None]:
    """Tell the bridge this process's place, before it opens a device.

    Returns:
        The variables that this sets, as they were before; for ``leave``.

    Raises:
        UnavailableError: The machine has fewer modules than processes.
    """
    load_bridge()
    before = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ID")}
    hccl: Any = import_module(f"{BRIDGE}.distributed.hccl")
    try:
        hccl.initialize_distributed_hpu(
            world_size=world.size, rank=world.rank, local_rank=world.local_rank
        )
    except AssertionError as error:
        raise UnavailableError(
            f"Process {world.local_rank} of {world.local_size} on this machine was to open a Gaudi "
            f"module of its own, and {VISIBLE}={os.environ.get(VISIBLE, '')!r} names fewer.",
            f"Start fewer processes, or correct {VISIBLE}.",
        ) from error
    return before


def leave(before: Mapping[str, str | None]) -> None:
    """Set variables back to what they were."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
