"""Three small models with fixed parameters, data and optimizers, for recorded loss curves.

Whatever changes a number here, or the order in which numbers are drawn, needs new recordings:
``python -m drivetrain_conformance.reference_record``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from drivetrain_conformance.support.problems import draw, exact, fill

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    Batch = tuple[Tensor, Tensor]

#: Updates of a curve; the batches come round several times, so that something is learnt.
STEPS = 20
BATCHES = 4
ROWS = 8
CLASSES = 4
WORDS, LENGTH = 11, 6


class Perceptron(nn.Module):
    """Three linear layers, relu and tanh."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES)),
        )
        fill(self, 1, below=0.375)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of the classes."""
        scores: Tensor = self.layers(features)
        return scores


class Convolutions(nn.Module):
    """Two convolutions with batch statistics, and a linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 8, 3, stride=2)
        self.second_norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)
        fill(self, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes."""
        hidden = functional.relu(self.first_norm(self.first(images)))
        hidden = functional.relu(self.second_norm(self.second(hidden)))
        scores: Tensor = self.head(self.dropout(hidden.mean((2, 3))))
        return scores


class Transformer(nn.Module):
    """One block with two heads of attention over a few words."""

    def __init__(self, dropout: float = 0.0, *, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Embedding(LENGTH, width)
        self.attention_norm = nn.LayerNorm(width)
        self.mixing = nn.Linear(width, 3 * width)
        self.joining = nn.Linear(width, width)
        self.block_norm = nn.LayerNorm(width)
        self.block = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS)
        fill(self, 3, below=0.25)

    def forward(self, words: Tensor) -> Tensor:
        """Scores of the next word at each place."""
        rows, length = words.shape
        places = torch.arange(length, device=words.device)
        hidden = self.words(words) + self.places(places)
        split = self.mixing(self.attention_norm(hidden)).view(rows, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)
        attention = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed = (attention @ value).transpose(1, 2).reshape(rows, length, -1)
        hidden = hidden + self.joining(mixed)
        hidden = hidden + self.block(self.block_norm(hidden))
        made: Tensor = self.head(self.last_norm(hidden))
        return made


def labels(shape: tuple[int, ...], below: int, seed: int) -> Tensor:
    """Class numbers, drawn by Python's own generator."""
    return torch.tensor(draw(math.prod(shape), below, seed)).reshape(shape)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    """The loss of all three, in float32 or better, as it is usually computed."""
    inputs, targets = batch
    scores = module(inputs)
    if scores.dtype in {torch.float16, torch.bfloat16}:
        scores = scores.float()
    return functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """One of the three.

    Attributes:
        make: The module, in float32; its argument is the share that dropout takes.
        optimizers: Makes its optimizers.
        batches: What it is trained on, over and over.
    """

    make: Callable[[float], nn.Module]
    optimizers: Callable[[nn.Module], list[Optimizer]]
    batches: tuple[Batch, ...]

    def windows(self, steps: int = STEPS) -> list[list[Batch]]:
        """One batch for each update."""
        return [[self.batches[step % len(self.batches)]] for step in range(steps)]


def _momentum(module: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)]


def _adam(module: nn.Module) -> list[Optimizer]:
    # The large eps keeps gradients near zero, whose sign is noise, from moving at full speed.
    return [torch.optim.AdamW(module.parameters(), lr=0.02, eps=1e-2)]


def _numbers(shape: tuple[int, ...], seed: int) -> tuple[Any, ...]:
    return tuple(
        (exact(shape, seed + number), labels((shape[0],), CLASSES, seed + 50 + number))
        for number in range(BATCHES)
    )


def _sentences() -> tuple[Any, ...]:
    drawn = (labels((ROWS, LENGTH + 1), WORDS, 900 + number) for number in range(BATCHES))
    return tuple((words[:, :-1].contiguous(), words[:, 1:].contiguous()) for words in drawn)


MODELS = {
    "mlp": ReferenceModel(Perceptron, _momentum, _numbers((ROWS, 8), 700)),
    "conv-batchnorm": ReferenceModel(Convolutions, _momentum, _numbers((ROWS, 1, 8, 8), 800)),
    "transformer": ReferenceModel(Transformer, _adam, _sentences()),
}
