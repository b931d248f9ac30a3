"""Small models and data that are the same on every machine, device and version of torch.

All numbers are multiples of 1/64 below two, drawn by Python's own generator. So every format that a
backend may declare holds them exactly, and a difference is the arithmetic's.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    Microbatch = tuple[Tensor, Tensor]

_STEPS = 64
FEATURES, HIDDEN, OUTPUTS = 3, 5, 2


def draw(count: int, below: int, seed: int) -> list[int]:
    """Integers from 0 up, the same in every version of Python: only ``random()`` promises that."""
    generator = random.Random(seed)  # noqa: S311 - reproducible is what it has to be
    return [int(generator.random() * below) for _ in range(count)]


def exact(shape: Sequence[int], seed: int, *, below: float = 1.0) -> Tensor:
    """A float32 tensor of multiples of 1/64 between ``-below`` and ``below``."""
    most = round(below * _STEPS)
    values = [(n - most) / _STEPS for n in draw(math.prod(shape), 2 * most + 1, seed)]
    return torch.tensor(values, dtype=torch.float32).reshape(tuple(shape))


def fill(module: nn.Module, seed: int = 0, *, below: float = 0.5) -> nn.Module:
    """Give every parameter exact values; one-dimensional ones of norms keep theirs."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            if "norm" not in name:
                parameter.copy_(exact(parameter.shape, 1000 * seed + number, below=below))
    return module


def perceptron(seed: int = 0) -> nn.Module:
    """Two linear layers and a tanh between them: 32 parameters, in float32."""
    return fill(
        nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)), seed
    )


def microbatches(count: int, *, rows: int | Sequence[int] = 4, seed: int = 0) -> list[Microbatch]:
    """Features and targets for the perceptron.

    Args:
        count: How many microbatches.
        rows: Samples in each, one number for all or one for each.
        seed: Other numbers for another seed.
    """
    sizes = [rows] * count if isinstance(rows, int) else list(rows)
    return [
        (
            exact((size, FEATURES), 7_000_000 + 1000 * seed + 2 * n),
            exact((size, OUTPUTS), 7_000_001 + 1000 * seed + 2 * n, below=1.5),
        )
        for n, size in enumerate(sizes)
    ]


def mean_square(module: nn.Module, microbatch: Microbatch) -> Tensor:
    """The loss of the perceptron: the mean over samples and outputs."""
    features, targets = microbatch
    loss: Tensor = (module(features) - targets).square().mean()
    return loss


def samples(microbatch: Microbatch) -> float:
    """The weight of a microbatch: how many samples it holds."""
    return float(microbatch[0].shape[0])


def joined(parts: Sequence[Microbatch]) -> Microbatch:
    """Several microbatches as one."""
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def whole(tensor: Tensor) -> Tensor:
    """The tensor; if ranks hold parts of it, all of them call this and have the whole."""
    made: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return made


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters on the host, read from the module itself."""
    with torch.no_grad():
        return {n: whole(p).to("cpu", copy=True) for n, p in module.named_parameters()}


def sgd(module: nn.Module, lr: float = 0.5, **options: Any) -> torch.optim.SGD:
    """Plain gradient descent: what moves is the learning rate times the gradient."""
    return torch.optim.SGD(module.parameters(), lr=lr, **options)
