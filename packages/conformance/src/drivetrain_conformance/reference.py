"""Training by hand, in float64 on the host: what every backend is compared with.

It uses torch's operations and gradients, and no optimizer, precision, strategy or step of anybody.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_interfaces import Clip


@dataclass(slots=True)
class Trained:
    """What training by hand led to.

    Attributes:
        losses: The weighted mean loss of each window.
        norms: The total gradient norm of each window, before clipping.
        gradients: The gradients of each window, before clipping, by name.
        start: The parameters before, by name.
        end: The parameters after, by name.
    """

    start: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)


def train_by_hand(
    module: nn.Module,
    windows: Sequence[Sequence[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float,
    clip: Clip | None = None,
    weight: Callable[[Any], float] | None = None,
) -> Trained:
    """Gradient descent on a float64 copy of ``module``; the module itself stays as it is.

    Args:
        module: What to train, on the host.
        windows: Microbatches of each update.
        loss: Called with the copy and one microbatch, in float64.
        lr: What gradients are multiplied by.
        clip: By norm or by value, or not at all.
        weight: The weight of a microbatch; None counts all alike.
    """
    twin = copy.deepcopy(module).to("cpu").double()
    named = dict(twin.named_parameters())
    told = Trained({name: p.detach().clone() for name, p in named.items()})
    for window in windows:
        weights = [1.0 if weight is None else weight(item) for item in window]
        shares = [w / math.fsum(weights) for w in weights]
        mean = sum(
            share * loss(twin, as_double(item)) for share, item in zip(shares, window, strict=True)
        )
        assert isinstance(mean, Tensor)
        grads = dict(zip(named, torch.autograd.grad(mean, list(named.values())), strict=True))
        told.losses.append(float(mean.detach()))
        told.norms.append(norm(grads))
        told.gradients.append(grads)
        with torch.no_grad():
            for name, grad in clipped(grads, clip).items():
                named[name].sub_(grad, alpha=lr)
    told.end = {name: p.detach().clone() for name, p in named.items()}
    return told


def as_double(value: Any) -> Any:
    """Floating tensors of a batch in float64, on the host."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(as_double(item) for item in value)
    return value


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The 2-norm of all tensors taken as one vector."""
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors.values()))


def clipped(grads: Mapping[str, Tensor], clip: Clip | None) -> dict[str, Tensor]:
    """Gradients as clipping leaves them."""
    if clip is None:
        return dict(grads)
    if clip.by == "value":
        return {name: grad.clamp(-clip.value, clip.value) for name, grad in grads.items()}
    factor = min(1.0, clip.value / norm(grads)) if norm(grads) else 1.0
    return {name: grad * factor for name, grad in grads.items()}


def way(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the parameters before to those after, in float64."""
    return {name: end[name].double() - start[name].double() for name in start}


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """How far ``found`` is from ``wanted``, relative to the length of ``wanted``."""
    length = norm(wanted)
    apart = norm(way(wanted, found))
    return apart / length if length else apart
