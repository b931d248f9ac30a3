"""Whether any rank of a run makes progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import SideChannel, World

#: Ranks tell the others how far they are at most this often, in seconds.
SHARE_SECONDS = 1.0


class Progressing:
    """How far this rank is, how long it has been there, and whether the others move.

    Called by one thread, a few times a second; it reads a number that the main thread counts up.

    Args:
        world: This process's place.
        channel: Where ranks tell.
        run: Name of the run.
        timeout: Seconds without progress that are a hang, or None.
    """

    def __init__(
        self, world: World, channel: SideChannel | None, run: str, timeout: float | None
    ) -> None:
        self.timeout = timeout
        self.place: Callable[[], int] | None = None
        self._world = world
        self._channel = channel
        self._run = run
        self._alive = 0
        self._seen: tuple[int, int] = (-1, -1)
        self._moved = time.monotonic()
        self._shared = 0.0
        self._others: tuple[bytes | None, ...] | None = None

    def begin(self, place: Callable[[], int]) -> None:
        """From here on this rank is expected to move. Called by the main thread."""
        self._moved = time.monotonic()
        self.place = place

    def alive(self) -> None:
        """Count progress that is no step. Called by the main thread."""
        self._alive += 1

    @property
    def idle(self) -> float:
        """Seconds since this rank, or as far as is known any other, has moved; 0 in set-up."""
        if self.place is None:
            return 0.0
        return time.monotonic() - self._moved

    def share(self) -> None:
        """Notice and tell that this rank has moved."""
        now = time.monotonic()
        if self.place is None:  # set-up may take as long as it likes
            return
        here = (self.place(), self._alive)
        if here == self._seen:
            return
        self._seen, self._moved, self._others = here, now, None
        if self.timeout is not None and now - self._shared >= self._often:
            assert self._channel is not None
            self._shared = now
            self._channel.post(f"{self._run}/at/{self._world.rank}", repr(here).encode())

    def stalled(self) -> bool:
        """Whether no rank has moved for as long as the timeout. Others are asked halfway to it."""
        if self.timeout is None or self.idle < self.timeout / 2:
            return False
        if self._others is None:
            self._others = self._ask()
        if self.idle < self.timeout:
            return False
        now = self._ask()
        if now == self._others:
            return True
        self._others, self._moved = now, time.monotonic() - self.timeout / 2
        return False

    @property
    def _often(self) -> float:
        return min(SHARE_SECONDS, (self.timeout or 0.0) / 8)

    def _ask(self) -> tuple[bytes | None, ...]:
        assert self._channel is not None
        ranks = (rank for rank in range(self._world.size) if rank != self._world.rank)
        return tuple(self._channel.peek(f"{self._run}/at/{rank}") for rank in ranks)
