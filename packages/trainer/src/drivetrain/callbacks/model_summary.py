"""What a model consists of, printed once before training."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from drivetrain_interfaces import ConfigurationError
from torch.nn.parameter import is_lazy

from drivetrain.callbacks.base import Callback

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from drivetrain.module import Module
    from drivetrain.trainer import Trainer

_HEADER = ("Name", "Type", "Parameters", "Trainable", "Size")
_KILO = 1000
_UNITS = "KMGT"


@dataclass(frozen=True, slots=True)
class Layer:
    """One module and everything inside it.

    Attributes:
        name: Its path; empty for the model itself.
        kind: Its class.
        parameters: How many numbers its parameters hold; shared ones count once.
        trainable: How many of them are trained.
        size: Bytes of its parameters and buffers on this rank.
        lazy: Whether some parameters get their shape only at the first forward.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    size: int
    lazy: bool = False

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        more = "+" if self.lazy else ""
        return (
            self.name or "total",
            self.kind,
            count(self.parameters).rstrip() + more,
            count(self.trainable).rstrip() + more,
            f"{count(self.size)}B",
        )


def summarize(module: nn.Module, max_depth: int = 1) -> list[Layer]:
    """The modules down to a depth, in order, and the whole model last.

    Args:
        module: The model.
        max_depth: 1 for the model's own children, 2 for theirs too, -1 for everything, 0 for the
            total alone.
    """
    layers = [
        _layer(name, child)
        for name, child in module.named_modules()
        if name and (max_depth < 0 or name.count(".") < max_depth)
    ]
    return [*layers, _layer("", module)]


def count(number: int) -> str:
    """A number that is easy to read: ``999``, ``1.2 K``, ``45.6 M``."""
    if number < _KILO:
        return f"{number} "
    power = min(int(math.log(number, _KILO)), len(_UNITS))
    return f"{number / _KILO**power:.1f} {_UNITS[power - 1]}"


def _layer(name: str, module: nn.Module) -> Layer:
    parameters = list(module.parameters())
    shaped = [each for each in parameters if not is_lazy(each)]
    return Layer(
        name=name,
        kind=type(module).__name__,
        parameters=sum(each.numel() for each in shaped),
        trainable=sum(each.numel() for each in shaped if each.requires_grad),
        size=_bytes(shaped) + _bytes(module.buffers()),
        lazy=len(shaped) < len(parameters),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not is_lazy(tensor))


class ModelSummary(Callback):
    """Prints a table of the model's modules before training: a rich one on a terminal.

    Args:
        max_depth: How deep to go: 1 for the model's own children, -1 for everything.
        stream: Where to print; standard error by default.

    Raises:
        ConfigurationError: ``max_depth`` is below -1.
    """

    def __init__(self, max_depth: int = 1, *, stream: TextIO | None = None) -> None:
        if max_depth < -1:
            raise ConfigurationError(
                f"{type(self).__name__} was given max_depth={max_depth}.",
                "Use -1 for everything, or 0 and more.",
            )
        self.max_depth = max_depth
        self._stream = stream

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Print it, on rank 0."""
        if not trainer.is_global_zero:
            return
        layers = summarize(module, self.max_depth)
        stream = self._stream or sys.stderr
        if stream.isatty():
            _print_rich(layers, stream)
        else:
            stream.write(as_text(layers))
            stream.flush()


def as_text(layers: list[Layer]) -> str:
    """The table as aligned plain text."""
    rows = [_HEADER, *(layer.cells() for layer in layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for row in rows:
        text = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        text += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(text).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], ""])


def _print_rich(layers: list[Layer], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, title in enumerate(_HEADER):
        table.add_column(title, justify="left" if number < 2 else "right")  # noqa: PLR2004
    for layer in layers[:-1]:
        table.add_row(*layer.cells())
    table.add_section()
    table.add_row(*layers[-1].cells(), style="bold")
    Console(file=stream).print(table)
