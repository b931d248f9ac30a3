"""Copying batches to a device beside its work, on a stream of its own.

The host runs ahead of a device. So a copy that waits for nothing but the copies before it is over
by the time that the step needs it, while in the queue of the work it would wait for the step before
and make the next one wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drivetrain_toolkit.trees import mapped, move

if TYPE_CHECKING:
    from drivetrain_interfaces import SupportsStreams


class SideStreamFeed:
    """Moves batches to a device. What ``move`` does, on the accelerator's stream for copies.

    Tensors on the host are copied to pinned memory first, from which a device reads by itself,
    unless the loader has done that (``pin_memory=True``), which is cheaper.

    Args:
        accelerator: Whose stream it is.
        device: Where batches go.
    """

    def __init__(self, accelerator: SupportsStreams, device: torch.device) -> None:
        self._device = device
        self._stream = accelerator.copy_stream(device)

    def __call__(self, batch: Any) -> Any:
        """The batch on the device; the same object if it is there already."""
        if self._is_there(batch):
            return batch
        work = torch.accelerator.current_stream(self._device)
        copied: list[Tensor] = []
        others = False

        def leaf(value: Any) -> Any:
            nonlocal others
            if not isinstance(value, Tensor):
                others = True
                return value
            if value.device == self._device:
                return value
            if value.device.type == "cpu" and not value.is_pinned():
                value = value.pin_memory()
            copied.append(value.to(self._device, non_blocking=True))
            return copied[-1]

        torch.accelerator.set_stream(self._stream)
        try:
            fed = mapped(batch, leaf)
        finally:
            torch.accelerator.set_stream(work)
        if copied:
            work.wait_stream(self._stream)
            for tensor in copied:  # their memory is the other stream's until the work is done
                tensor.record_stream(work)
        # What an object's own ``to`` allocates cannot be told, so that runs among the work.
        return move(fed, self._device) if others else fed

    def _is_there(self, batch: Any) -> bool:
        """A quick look at the usual kinds of batches."""
        kind = type(batch)
        if kind is Tensor:
            return bool(batch.device == self._device)
        return (kind is tuple or kind is list) and all(
            type(item) is Tensor and item.device == self._device for item in batch
        )
