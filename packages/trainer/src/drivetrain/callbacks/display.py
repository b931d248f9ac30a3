"""How progress is shown: a line that is redrawn on a terminal, lines one below the other elsewhere.

Nothing here runs in a thread of its own: a display draws when it is told to.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

_BAR_WIDTH = 30
_MINUTE = 60
_THOUSAND = 1000
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class View:
    """What there is to show.

    Attributes:
        title: What is going on, such as ``"epoch 3/10"``.
        done: Batches done.
        total: Batches in all; infinite if nobody knows.
        rate: Batches in a second; 0 if nobody knows.
        seconds: How long it has taken.
        metrics: Values to show, by name.
    """

    title: str
    done: int
    total: float
    rate: float = 0.0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def parts(self) -> list[str]:
        """The texts, in order, without those that are empty."""
        values = "  ".join(f"{name}={_number(value)}" for name, value in self.metrics.items())
        texts = (self.title, self.counts(), duration(self.seconds), self._speed(), values)
        return [text for text in texts if text]

    def _speed(self) -> str:
        if not self.rate:
            return ""
        return f"{self.rate:.3g} it/s" if self.rate < _THOUSAND else f"{self.rate:.0f} it/s"

    def counts(self) -> str:
        """Done and total, such as ``"120/500"``."""
        return f"{self.done}/{'?' if math.isinf(self.total) else int(self.total)}"


class Display(Protocol):
    """Shows views."""

    def update(self, view: View) -> None:
        """Show the present state, in place of what ``update`` showed before."""
        ...

    def keep(self, view: View) -> None:
        """Show a state that stays."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was. Safe to call twice."""
        ...


class Lines:
    """Plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, view: View) -> None:
        """Write a line."""
        self._stream.write(" | ".join(view.parts()) + "\n")
        self._stream.flush()

    keep = update

    def close(self) -> None:
        """Nothing is open."""


class Live:
    """A line at the bottom of the terminal; what is kept or printed goes above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        console = Console(file=stream)
        self._live = RichLive(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=stream is sys.stderr,
        )

    def update(self, view: View) -> None:
        """Redraw the line."""
        if not self._live.is_started:
            self._live.start()
        self._live.update(_drawn(view), refresh=True)

    def keep(self, view: View) -> None:
        """Print above the line."""
        self._live.console.print(" | ".join(view.parts()), highlight=False, markup=False)

    def close(self) -> None:
        """Remove the line and give the streams back."""
        if self._live.is_started:
            self._live.stop()


def make_display(stream: TextIO, *, plain: bool | None) -> Display:
    """The display for a stream; ``plain`` overrules what the stream is."""
    if plain is None:
        plain = not (stream.isatty() and _can_redraw(stream))
    return Lines(stream) if plain else Live(stream)


def duration(seconds: float) -> str:
    """Seconds as people write them: ``3.2 s``, ``4:05``, ``1:02:03``; empty for none."""
    if seconds < _MINUTE:
        return f"{seconds:.1f} s" if seconds else ""
    minutes, rest = divmod(int(seconds), _MINUTE)
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _can_redraw(stream: TextIO) -> bool:
    from rich.console import Console

    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


def _number(value: float) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < _MILLION else f"{number:.4g}"


def _drawn(view: View) -> RenderableType:
    from rich.progress_bar import ProgressBar as Bar
    from rich.table import Table
    from rich.text import Text

    cells: list[RenderableType] = [Text(text, no_wrap=True) for text in view.parts()]
    if not math.isinf(view.total):
        cells.insert(1, Bar(total=view.total, completed=view.done, width=_BAR_WIDTH))
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_row(*cells)
    return row
