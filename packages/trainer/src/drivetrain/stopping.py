"""Stopping on a signal: handlers set a flag, the loop acts at a step boundary, ranks agree.

A signal may reach one rank only, and ranks that stop at different steps leave each other waiting in
a collective. Asking every step would cost a host synchronization. So a thread looks a few times a
second at a side channel. When a stop is asked for there, each rank freezes: it publishes how many
windows it has begun, waits at its next boundary until all have published, and all go on to the
largest of these numbers. A rank that is busy in a collective has its thread publish for it.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ProcessFailedError

if TYPE_CHECKING:
    from types import FrameType

    from drivetrain_interfaces import SideChannel, World
    from typing_extensions import Self

#: How often the side channel is looked at, in seconds; bounds how late ranks learn of a stop.
POLL_SECONDS = 0.25
#: How long a rank waits at a boundary for the others to say where they are, in seconds.
AGREE_SECONDS = 120.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A run that a signal ended cleanly at a step boundary. Its exit code is 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return type(self), (int(self.signal),)


class StopRequest:
    """Whether and where this run stops before its limit. One object per ``fit``.

    Attributes:
        requested: True once there is a reason to look closer; the loop checks it before a window.
        signal: The signal that asked, or None.
    """

    def __init__(self, world: World, channel: SideChannel | None, run: str) -> None:
        self.requested = False
        self.signal: signal.Signals | None = None
        self._world = world
        self._channel = channel
        self._run = run
        self._begun = 0
        self._said = False
        self._asked: int | None = None
        self._target: int | None = None
        self._done = threading.Event()
        self._agreed = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._on_signal) for each in _SIGNALS}
        if self._channel is not None:
            self._thread = threading.Thread(target=self._watch, name="drivetrain-stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._channel is not None:
            # A rank that ended at its limit also says where it is, or others would wait for it. One
            # that failed does not: an error about the channel would hide the one that matters.
            if kind is None:
                self._publish(self._channel)
            self._channel.close()

    def _publish(self, channel: SideChannel) -> None:
        """Say where this rank is, once: a number that changed would be read by some ranks only."""
        if self._said:
            return
        self._said = True
        channel.post(f"{self._run}/begun/{self._world.rank}", str(self._begun).encode())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            # A second Ctrl-C means now: the person does not want to wait for the boundary.
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self.ask(number)

    def ask(self, number: int = 0) -> None:
        """Ask all ranks to stop at one boundary. Safe in a signal handler: it sets attributes."""
        self._asked = number
        if self._channel is None:
            self.requested = True

    @property
    def ends_evaluation(self) -> bool:
        """Whether an evaluation may end at the next batch: only where no other rank waits."""
        return self.requested and self._channel is None

    def stops_before(self, window: int) -> bool:
        """Whether the run ends before this window. Called at a boundary, when ``requested``.

        Args:
            window: The number of windows begun, this one included.

        Raises:
            ProcessFailedError: Other ranks did not say where they are in time.
        """
        if self._channel is None:
            return True
        if not self._agreed.wait(AGREE_SECONDS):
            raise ProcessFailedError(
                f"Rank {self._world.rank} was asked to stop, and {AGREE_SECONDS:.0f} s later not "
                f"all of the {self._world.size} ranks had said where they are.",
                "Look at the output of the other ranks; one of them hangs or has ended.",
            )
        return self._target is not None and window > self._target

    def begin(self, window: int) -> bool:
        """Whether the run may begin this window. Called before each one."""
        # First publish, then look: the thread does it the other way round, so none slips through.
        self._begun = window
        return not (self.requested and self.stops_before(window))

    def _watch(self) -> None:
        channel = self._channel
        assert channel is not None
        told = False
        while not self._done.is_set():
            if self._asked is not None and not told:
                told = True
                channel.post(f"{self._run}/stop", str(self._asked).encode())
            asked = channel.peek(f"{self._run}/stop")
            if asked is not None:
                self._agree(channel, int(asked))
                return
            self._done.wait(POLL_SECONDS)

    def _agree(self, channel: SideChannel, asked: int) -> None:
        if asked and self.signal is None:
            self.signal = signal.Signals(asked)
        self.requested = True
        self._publish(channel)
        begun: dict[int, int] = {}
        deadline = time.monotonic() + AGREE_SECONDS
        while len(begun) < self._world.size and time.monotonic() < deadline:
            for rank in set(range(self._world.size)) - set(begun):
                said = channel.peek(f"{self._run}/begun/{rank}")
                if said is not None:
                    begun[rank] = int(said)
            if self._done.is_set():
                return
            if len(begun) < self._world.size:
                self._done.wait(POLL_SECONDS / 10)
        if len(begun) == self._world.size:
            self._target = max(begun.values())
            self._agreed.set()
