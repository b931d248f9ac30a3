"""Opening torch_xla's runtime: once, in one of two ways, and before gradients are computed.

A process that has opened devices one by one cannot take them as one (SPMD) any more: torch_xla 2.9
crashes. So nothing is opened before it is known what a strategy wants.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnavailableError, UnsupportedError

from drivetrain_xla import device_module

if TYPE_CHECKING:
    from drivetrain_interfaces import World

#: Set by torch_xla in a process that it has given a chip of its own.
_TOLD = "PJRT_LOCAL_PROCESS_COUNT"

_opened: list[str] = []


def is_open() -> bool:
    """Whether ``open_runtime`` was called."""
    return bool(_opened)


def load_library() -> None:
    """Import torch_xla, which makes torch know the device type and opens nothing.

    Raises:
        UnavailableError: It does not load.
    """
    try:
        import torch_xla  # noqa: F401 - for what importing it does
    except ImportError as error:
        raise UnavailableError(
            f"torch_xla does not load: {error}.", "Install torch and torch_xla of one version."
        ) from error
    device_module.register()


def has_its_own_chip(local_rank: int, local_size: int) -> bool:
    """Make sure that one of several processes of a machine takes its own chip, and no other.

    Returns:
        Whether it sees no other devices. On the CPU runtime every process has all devices.

    Raises:
        UnavailableError: It cannot be found out how the chips of the machine are connected.
    """
    if os.environ.get("PJRT_DEVICE") == "CPU":
        return False
    if _TOLD not in os.environ:  # torch_xla.launch has done it
        load_library()
        from torch_xla._internal import pjrt  # noqa: PLC2701 - as xla:// does it

        try:
            pjrt.initialize_multiprocess(local_rank, local_size)
        except Exception as error:
            raise UnavailableError(
                f"Process {local_rank} of {local_size} on this machine could not take its own "
                f"TPU chip ({type(error).__name__}: {error}).",
                "Look whether this is a TPU machine, or let one process drive all devices.",
            ) from error
    return True


def spans(world: World) -> bool:
    """Whether XLA's own collectives reach all ranks of a world. Opens the runtime."""
    open_runtime()
    import torch_xla.runtime as xr

    return not xr.is_spmd() and int(xr.world_size()) == world.size


def open_runtime(*, spmd: bool = False) -> None:
    """Open the runtime, and make sure that gradients can be had on it.

    Torch's engine for gradients counts devices when it is first used, and XLA's are there only once
    the runtime is open; so the runtime must come first (seen with torch 2.9).

    Args:
        spmd: Take all devices as one. Where they are one already, nothing has to be done.

    Raises:
        UnavailableError: There is no device, or this process has computed gradients already.
        UnsupportedError: This process has opened the devices in the other way.
    """
    if _opened and not spmd:
        return
    asked = os.environ.get("PJRT_DEVICE")  # torch_xla sets it where it is not set
    load_library()
    if spmd:
        _take_all_as_one()
    if not _opened:
        _opened.append(_open(asked))
        _try_a_gradient()


def _take_all_as_one() -> None:
    import torch_xla
    import torch_xla.runtime as xr

    if xr.is_spmd():
        return
    if torch_xla._XLAC._xla_get_spmd_config_is_locked():  # noqa: SLF001 - nothing else tells
        raise UnsupportedError(
            "All XLA devices were to be trained on as one (SPMD) in a process that has used them "
            "one by one before, which torch_xla cannot change.",
            "Do it in another process, or call drivetrain_xla.runtime.open_runtime(spmd=True) "
            "where the program starts.",
        )
    xr.use_spmd()


def _open(asked: str | None) -> str:
    import torch_xla.runtime as xr

    try:
        xr.global_runtime_device_count()
        kind: str = xr.device_type()
    except RuntimeError as error:
        raise UnavailableError(
            f"torch_xla could not open its devices: {error}",
            "End other programs that use the TPU, and look at what libtpu says.",
        ) from error
    if kind == "CPU" and asked != "CPU":
        raise UnavailableError(
            "torch_xla found no TPU and took the CPU, which nobody asked for.",
            "Set PJRT_DEVICE=CPU to train on the CPU behind XLA, or use accelerator='cpu'.",
        )
    return kind


def _try_a_gradient() -> None:
    """A gradient that is traced and never computed."""
    value = torch.ones((), device=device_module.NAME, requires_grad=True)
    try:
        (value * 2).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UnavailableError(
            "The XLA runtime was opened in a process that had computed gradients on the CPU "
            "before, and torch can then compute none on XLA devices.",
            "Train on XLA first, or call drivetrain_xla.runtime.open_runtime() where the program "
            "starts.",
        ) from error
