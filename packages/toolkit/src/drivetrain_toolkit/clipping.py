"""Gradient clipping, by total norm and by value. Nothing here waits for the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces import Clip

#: Keeps the division defined where all gradients are zero; the value that torch uses.
_TINY = 1e-6


def gradients(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """The gradients of all that ``optimizers`` update, each once, in their order."""
    if len(optimizers) == 1:
        groups = optimizers[0].param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]
    parameters = {
        id(p): p for item in optimizers for group in item.param_groups for p in group["params"]
    }
    return [p.grad for p in parameters.values() if p.grad is not None]


def total_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken as one vector: a scalar on their device."""
    if not grads:
        return torch.zeros(())
    # A sparse gradient may hold an element in several parts; only their sum has a norm.
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    norms = torch._foreach_norm(dense, 2.0)  # noqa: SLF001 - documented, underscore or not
    home = norms[0].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(home) for norm in norms]))
    return norm


def clip_by_norm(
    grads: list[Tensor], limit: float, measure: Callable[[list[Tensor]], Tensor] = total_norm
) -> Tensor:
    """Scale all gradients in place so that their total norm is at most ``limit``.

    Args:
        grads: The gradients, or this rank's parts of them.
        limit: The largest norm.
        measure: Takes the norm; of all ranks' parts, if these are parts.

    Returns:
        The total norm before clipping: a scalar on the device.
    """
    norm = measure(grads)
    if grads:
        factor = torch.clamp(limit / (norm + _TINY), max=1.0)
        scale(grads, factor)
    return norm


def clip_by_value(grads: list[Tensor], limit: float) -> None:
    """Limit every element of the gradients, in place, to ``-limit … limit``."""
    if grads:
        torch._foreach_clamp_min_(grads, -limit)
        torch._foreach_clamp_max_(grads, limit)


def scale(grads: list[Tensor], factor: Tensor | float) -> None:
    """Multiply all gradients, in place, by one number or scalar tensor."""
    if not grads:
        return
    if not isinstance(factor, Tensor) or all(grad.device == factor.device for grad in grads):
        torch._foreach_mul_(grads, factor)
    else:
        for grad in grads:
            grad.mul_(factor.to(grad.device))


def check_clip(clip: Clip | None) -> None:
    """Refuse a clipping that cannot be done, when a step is built.

    Raises:
        UnsupportedError: It is neither by norm nor by value.
        ConfigurationError: The limit is not a positive number.
    """
    if clip is None:
        return
    if clip.by not in {"norm", "value"}:
        raise UnsupportedError(
            f"Gradient clipping by {clip.by!r} was asked for; there is 'norm' and 'value'.",
            "Use one of them.",
        )
    if not (clip.value > 0 and math.isfinite(clip.value)):
        raise ConfigurationError(
            f"Gradient clipping at {clip.value!r} was asked for, which is no positive number.",
            "Give a positive limit, or None for no clipping.",
        )
