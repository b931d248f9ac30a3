"""Counting what XLA compiles, and telling the user why it compiles again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch_xla.debug.metrics import counter_value

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Steps with one shape that may compile: without optimizer state, with it, after an update that a
#: loss scale prevented, and for what the loop does now and then.
_USUAL = 6
#: Different shapes that are normal: whole batches, the last batch of an epoch, tail windows.
_SHAPES = 4


class RecompilationWarning(UserWarning):
    """Training waits for the compiler again and again."""


def compilations() -> int:
    """Graphs that this process has compiled so far."""
    return counter_value("UncachedCompile") or 0


class RecompilationWatch:
    """Notices steps that compile, and warns once for each cause.

    Attributes:
        shapes: For each shape of input, how many steps with it compiled something.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, int] = {}
        self._warned: set[str] = set()
        self._steps = 0

    @property
    def total(self) -> int:
        """Steps that compiled something."""
        return sum(self.shapes.values())

    def note(self, compiled: int, microbatches: Sequence[Any]) -> None:
        """Tell of a step.

        Args:
            compiled: How many graphs were compiled in it; nearly always 0.
            microbatches: What it trained on.
        """
        self._steps += 1
        if not compiled:
            return
        shape = "; ".join(described(each) for each in microbatches)
        self.shapes[shape] = self.shapes.get(shape, 0) + 1
        if len(self.shapes) > _SHAPES:
            *_, before, now = self.shapes
            self._warn(
                "shapes",
                f"Step {self._steps} compiled for the {len(self.shapes)}th shape of input: "
                f"{now} after {before}. Pad batches to a few sizes, or use drop_last=True: XLA "
                "compiles anew for every shape.",
            )
        elif self.shapes[shape] > _USUAL:
            self._warn(
                "graphs",
                f"Step {self._steps} compiled again for input of the same shape, {shape}: the "
                f"{self.shapes[shape]}th time. Look for Python code in the step that depends on "
                "values, such as item() or 'if loss > 1', and for numbers that change.",
            )

    def _warn(self, cause: str, text: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(text, RecompilationWarning, stacklevel=4)


def described(batch: Any) -> str:
    """The shapes in a batch, such as ``float32[32, 8], int64[32]``."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return ", ".join(described(item) for item in batch)
    return type(batch).__name__
