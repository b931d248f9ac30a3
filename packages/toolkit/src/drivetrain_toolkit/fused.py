"""Optimizers that update all parameters in one kernel, where torch has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

#: Torch's optimizers with a fused kernel on every device that it lists for them.
FUSED: tuple[type[Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
)


def use_fused(optimizers: Sequence[Optimizer]) -> None:
    """Let these optimizers update by torch's fused kernels, from their next step on.

    Call it before their first step: a fused kernel keeps its step counts on the device.

    Raises:
        UnsupportedError: One of them has no such kernel for its parameters, or its settings exclude
            one. None of them was changed then.
    """
    for optimizer in optimizers:
        problem = _problem(optimizer)
        if problem:
            raise UnsupportedError(
                f"Fused optimizers were asked for, and {type(optimizer).__name__} {problem}.",
                f"Use one of {listed(kind.__name__ for kind in FUSED)} without these settings, or "
                "leave fused out.",
            )
    for optimizer in optimizers:
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["fused"] = True
            group["foreach"] = False


def _problem(optimizer: Optimizer) -> str:
    if type(optimizer) not in FUSED:
        return "has no fused kernel in torch"
    if optimizer.state:
        return "has made a step already"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "is to be differentiated"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(p.is_floating_point() for p in parameters):
        return "updates parameters that are not floating"
    allowed = _device_types()
    elsewhere = {p.device.type for p in parameters} - set(allowed)
    if elsewhere:
        return (
            f"updates parameters on {listed(elsewhere)}, while torch has fused kernels on "
            f"{listed(allowed)}"
        )
    return ""


def _device_types() -> list[str]:
    """The device types that torch has fused kernels for, that of a vendor's own among them."""
    from torch.utils import _foreach_utils  # noqa: PLC2701 - torch has no public list

    return _foreach_utils._get_fused_kernels_supported_devices()  # noqa: SLF001
