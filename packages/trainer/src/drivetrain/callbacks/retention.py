"""Which checkpoints are kept: a pure function, so that every rank agrees without talking."""

from __future__ import annotations

import math
from dataclasses import dataclass

Kept = tuple["Saved", ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint that was written.

    Attributes:
        path: Where it is.
        step: Applied optimizer steps at the time.
        score: The monitored value that these weights had; None if they were not scored.
    """

    path: str
    step: int
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """What to keep.

    Attributes:
        top_k: How many: the best if there is a monitor, else the newest; -1 for all.
        largest: Whether a larger score is better.
        monitored: Whether there are scores at all.
        newest: Whether the newest is kept besides, however good it is.
    """

    top_k: int
    largest: bool = False
    monitored: bool = False
    newest: bool = False

    def wants(self, kept: Kept, score: float | None) -> bool:
        """Whether a checkpoint with this score is worth writing."""
        if self.newest or self.top_k < 0:
            return True
        if not self.monitored:
            return self.top_k > 0
        if score is None:
            return False
        rivals = self.best(kept)[: self.top_k]
        if len(rivals) < self.top_k:
            return True
        return bool(rivals) and self._key(score) < self._key(rivals[-1].score)

    def after(self, kept: Kept, new: Saved) -> tuple[Kept, Kept]:
        """What is kept once ``new`` is written, and what is then to be removed.

        ``new`` itself always stays. One that has no score stays until something newer is written.
        """
        everything = (*(saved for saved in kept if saved.path != new.path), new)
        if self.top_k < 0:
            return everything, ()
        if self.monitored:
            winners = self.best(everything)[: self.top_k]
        else:
            winners = everything[max(len(everything) - self.top_k, 0) :]
        paths = {saved.path for saved in (*winners, new)}
        stays = tuple(saved for saved in everything if saved.path in paths)
        goes = tuple(saved for saved in everything if saved.path not in paths)
        return stays, goes

    def best(self, kept: Kept) -> Kept:
        """Those with a score, the best first; of equals the earlier, NaN at the end."""
        scored = [saved for saved in kept if saved.score is not None]
        return tuple(sorted(scored, key=lambda saved: self._key(saved.score)))

    def _key(self, score: float | None) -> tuple[bool, float]:
        if score is None or math.isnan(score):
            return True, 0.0
        return False, -score if self.largest else score
