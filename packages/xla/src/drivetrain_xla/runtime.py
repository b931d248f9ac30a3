"""Opening torch_xla's runtime, and what a process can know about it."""

from __future__ import annotations

import os

import torch
from drivetrain_interfaces import UnavailableError

from drivetrain_xla import device_module

_opened: set[str] = set()


def open_runtime() -> None:
    """Open the runtime, once for this process, and make sure that gradients can be had on it.

    Torch's engine for gradients counts devices when it is first used, and XLA's are there only once
    the runtime is open; so the runtime must come first (seen with torch 2.9).

    Raises:
        UnavailableError: torch_xla does not load, there is no device, or this process has used
            the engine already.
    """
    if _opened:
        return
    asked = os.environ.get("PJRT_DEVICE")  # torch_xla sets it where it is not set
    try:
        import torch_xla
        import torch_xla.runtime as xr

        device = torch_xla.device()
        kind = xr.device_type()
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(
            f"torch_xla could not open its devices: {error}",
            "Install torch and torch_xla of one version, and end other programs that use the TPU.",
        ) from error
    if kind == "CPU" and asked != "CPU":
        raise UnavailableError(
            "torch_xla found no TPU and took the CPU, which nobody asked for.",
            "Set PJRT_DEVICE=CPU to train on the CPU behind XLA, or use accelerator='cpu'.",
        )
    device_module.register()
    _try_a_gradient(device)
    _opened.add(device.type)


def _try_a_gradient(device: torch.device) -> None:
    """A gradient that is traced and never computed."""
    value = torch.ones((), device=device, requires_grad=True)
    try:
        (value * 2).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UnavailableError(
            "The XLA runtime was opened in a process that had computed gradients on the CPU "
            "before, and torch can then compute none on XLA devices.",
            "Train on XLA first, or call drivetrain_xla.runtime.open_runtime() where the program "
            "starts.",
        ) from error
