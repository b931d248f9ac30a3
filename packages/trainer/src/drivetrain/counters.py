"""Where a run stands. Everything that a resumed run continues from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(slots=True)
class Progress:
    """Counters of one fit.

    Attributes:
        epoch: Epochs completed.
        batch: Batches of the current epoch whose windows are done, on this rank.
        global_step: Optimizer steps that were applied.
        skipped: Windows whose update was not applied.
        validated_at: The value of ``batch`` at which validation last ran in this epoch, or -1.
        epoch_open: Whether the epoch-start hooks of the current epoch have run.
        elapsed: Seconds of training before this process.
    """

    epoch: int = 0
    batch: int = 0
    global_step: int = 0
    skipped: int = 0
    validated_at: int = -1
    epoch_open: bool = False
    elapsed: float = 0.0

    @property
    def attempts(self) -> int:
        """Windows that were trained on, applied or not."""
        return self.global_step + self.skipped

    def state_dict(self) -> dict[str, Any]:
        """The counters as JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved counters."""
        for item in fields(self):
            setattr(self, item.name, state[item.name])

    def next_epoch(self) -> None:
        """The current epoch is complete."""
        self.epoch += 1
        self.batch = 0
        self.validated_at = -1
        self.epoch_open = False
