"""Stopping early: the loop acts at a boundary, and all ranks take the same one.

A signal may reach one rank only, and ranks that stop at different steps leave each other waiting in
a collective. Asking every step would cost a host synchronization. So a thread looks a few times a
second at a side channel. When a stop is asked for there, each rank freezes: it publishes which
window or batch of an evaluation it has begun, waits at its next boundary until all have published,
and all go on to the furthest of these places. A rank that is busy in a collective has its thread
publish for it. At the end of the set-up all ask each other once, so that a signal which came to any
of them by then keeps all from their first window.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import TYPE_CHECKING

from drivetrain_interfaces import DrivetrainError, ProcessFailedError

from drivetrain.signals import Interrupted, SignalAction, SignalPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import SideChannel, World
    from typing_extensions import Self

log = logging.getLogger("drivetrain")

__all__ = ["Interrupted", "StopRequest"]

#: How often the side channel is looked at, in seconds; bounds how late ranks learn of a stop.
POLL_SECONDS = 0.25
#: How long a rank waits at a boundary for the others to say where they are, in seconds.
AGREE_SECONDS = 120.0

# A place is one number that grows: the window, in it the evaluation, and in that the batch. The
# last batch of an evaluation may be another one on each rank, so its end has a number of its own.
_WINDOW, _EVALUATION = 48, 40
_END = (1 << _EVALUATION) - 1


class StopRequest:
    """Whether and where this run stops before its limit. One object per run.

    Attributes:
        requested: True once there is a reason to look closer; the loop checks it at a boundary.
        signal: The signal that asked, or None. The same on all ranks once they have agreed.
    """

    def __init__(
        self,
        world: World,
        channel: SideChannel | None,
        run: str,
        policy: SignalPolicy | None = None,
    ) -> None:
        self.requested = False
        self.signal: signal.Signals | None = None
        self._policy = policy or SignalPolicy()
        self._world = world
        self._channel = channel
        self._run = run
        self._place = 0
        self._evaluation = 0
        self._said = False
        self._settled = False
        self._asked: int | None = None
        self._target: int | None = None
        self._done = threading.Event()
        self._agreed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._channel is not None:
            self._thread = threading.Thread(target=self._watch, name="drivetrain-stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._channel is not None:
            # A rank that ended at its limit also says where it is, or others would wait for it. One
            # that failed does not: an error about the channel would hide the one that matters.
            if kind is None:
                self._publish(self._channel)
            self._channel.close()

    @property
    def action(self) -> SignalAction:
        """What the stop means; for one without a signal, to save."""
        return self._policy.action(self.signal or 0)

    def ask(self, number: int = 0) -> None:
        """Ask all ranks to stop at one boundary. Safe in a signal handler: it sets attributes."""
        self._asked = number
        if self._channel is None:
            self.signal = signal.Signals(number) if number else None
            self.requested = True

    def place(self) -> int:
        """How far this rank is: a number that grows with every window and evaluation batch."""
        return self._place

    def settle(self, any_rank: Callable[[bool], bool]) -> None:
        """The end of the set-up, once; no rank goes on before all are here.

        If any rank was asked to stop by now, all learn it here, before they begin a window.

        Args:
            any_rank: Whether the argument is true on any rank; all ranks call it together.

        Raises:
            ProcessFailedError: Other ranks did not say where they are in time.
        """
        if self._channel is None or self._settled:
            return
        self._settled = True
        if any_rank(self._asked is not None):
            self._stops_here()  # nobody has begun a window, so none is before the common place

    # Boundaries
    def begin(self, window: int) -> bool:
        """Whether the run may begin this window. Called before each one.

        Args:
            window: The number of windows begun, this one included.

        Raises:
            ProcessFailedError: Other ranks did not say where they are in time.
        """
        # First tell, then look: the thread does it the other way round, so none slips through.
        self._place = self._evaluation = window << _WINDOW
        return not (self.requested and self._stops_here())

    def begin_evaluation(self) -> None:
        """An evaluation begins. All ranks begin the same ones between the same windows."""
        self._evaluation += 1 << _EVALUATION
        self._place = self._evaluation

    def begin_batch(self) -> bool:
        """Whether the evaluation may begin its next batch. Raises as ``begin``."""
        self._place += 1
        return not (self.requested and self._stops_here())

    def end_batches(self) -> bool:
        """Whether the evaluation may end as usual, with what all ranks do together at its end.

        Raises as ``begin``.
        """
        self._place = self._evaluation | _END
        return not (self.requested and self._stops_here())

    def _stops_here(self) -> bool:
        if self._channel is None:
            return True
        if not self._agreed.wait(AGREE_SECONDS):
            raise ProcessFailedError(
                f"Rank {self._world.rank} was asked to stop, and {AGREE_SECONDS:.0f} s later not "
                f"all of the {self._world.size} ranks had said where they are.",
                "Look at the output of the other ranks; one of them hangs or has ended.",
            )
        return self._target is not None and self._place > self._target

    # The side channel
    def _publish(self, channel: SideChannel) -> None:
        """Say where this rank is, once: a number that changed would be read by some ranks only."""
        if self._said:
            return
        self._said = True
        asked = self._asked or 0
        channel.post(f"{self._run}/begun/{self._world.rank}", f"{self._place} {asked}".encode())

    def _watch(self) -> None:
        assert self._channel is not None
        try:
            self._look(self._channel)
        except DrivetrainError as lost:  # rank 0 has ended; who watches over the run says so
            log.debug("the side channel is gone: %s", lost)

    def _look(self, channel: SideChannel) -> None:
        told = False
        while not self._done.is_set():
            if self._asked is not None and not told:
                told = True
                channel.post(f"{self._run}/stop", b"1")
            if channel.peek(f"{self._run}/stop") is not None:
                self._agree(channel)
                return
            self._done.wait(POLL_SECONDS)

    def _agree(self, channel: SideChannel) -> None:
        self.requested = True
        self._publish(channel)
        said: dict[int, tuple[int, int]] = {}
        deadline = time.monotonic() + AGREE_SECONDS
        while len(said) < self._world.size and time.monotonic() < deadline:
            for rank in set(range(self._world.size)) - set(said):
                found = channel.peek(f"{self._run}/begun/{rank}")
                if found is not None:
                    place, asked = map(int, found.split())
                    said[rank] = place, asked
            if self._done.is_set():
                return
            if len(said) < self._world.size:
                self._done.wait(POLL_SECONDS / 10)
        if len(said) == self._world.size:
            number = self._policy.strongest({asked for _, asked in said.values()})
            self.signal = signal.Signals(number) if number else None
            self._target = max(place for place, _ in said.values())
            self._agreed.set()
