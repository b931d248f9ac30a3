"""Watching the loss for NaN and infinity without waiting for the device at every step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import NonFiniteLossError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("drivetrain")


class LossWatch:
    """Keeps the losses since the last check on the device, and reads them all back at once.

    Args:
        policy: ``"raise"``, ``"warn"`` or ``"ignore"``.
    """

    def __init__(self, policy: str) -> None:
        self.add: Callable[[torch.Tensor], None] = _nothing
        self._policy = policy
        self._pending: list[torch.Tensor] = []
        if policy != "ignore":
            self.add = self._pending.append

    def check(self, epoch: int, steps: int) -> None:
        """Look at what was added since the last call.

        Args:
            epoch: The current epoch, for the message.
            steps: Windows trained on so far; the newest loss is that of the last one.

        Raises:
            NonFiniteLossError: A loss is not finite and the policy is ``"raise"``.
        """
        if not self._pending:
            return
        losses = torch.stack(self._pending)
        count = len(self._pending)
        self._pending.clear()
        finite = torch.isfinite(losses)
        if bool(finite.all()):
            return
        first = int((~finite).nonzero()[0])
        step = steps - count + first
        error = NonFiniteLossError(
            f"The loss became {float(losses[first])} at step {step} (epoch {epoch}).",
            "Lower the learning rate, clip gradients, or set nan_loss='warn' to go on.",
        )
        if self._policy == "raise":
            raise error
        log.warning("%s", error)


def _nothing(_loss: torch.Tensor) -> None: ...
