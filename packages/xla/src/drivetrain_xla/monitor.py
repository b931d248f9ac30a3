"""What the runtime has done so far, and where its time goes, by torch_xla's own counters."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch_xla.debug.metrics as met
from torch_xla.debug import profiler

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Counts:
    """Events of this process; subtract two of them to see what happened between.

    Attributes:
        compiled: Graphs that were compiled.
        reused: Graphs that came from the cache.
        syncs: How often recorded operations were handed over.
        read_back: Transfers from the device to the host, such as by ``item()``.
        fallbacks: Names of operations that XLA lacks and that ran on the host.
    """

    compiled: int
    reused: int
    syncs: int
    read_back: int
    fallbacks: tuple[str, ...] = ()

    def __sub__(self, before: Counts) -> Counts:
        return Counts(
            self.compiled - before.compiled,
            self.reused - before.reused,
            self.syncs - before.syncs,
            self.read_back - before.read_back,
            tuple(sorted(set(self.fallbacks) - set(before.fallbacks))),
        )


def counts() -> Counts:
    """The events so far."""
    read_back = met.metric_data("TransferFromDeviceTime")
    return Counts(
        compiled=met.counter_value("UncachedCompile") or 0,
        reused=met.counter_value("CachedCompile") or 0,
        syncs=met.counter_value("MarkStep") or 0,
        read_back=read_back[0] if read_back else 0,
        fallbacks=tuple(sorted(met.executed_fallback_ops())),
    )


def report() -> str:
    """Torch_xla's report of all its counters and times, as text."""
    text: str = met.metrics_report()
    return text


@contextmanager
def trace(folder: str) -> Iterator[None]:
    """Record what devices and host do in the ``with`` block, for TensorBoard's profile page.

    Args:
        folder: Where the trace is written.
    """
    profiler.start_trace(folder)
    try:
        yield
    finally:
        profiler.stop_trace()
