"""Watching over processes: noticing an end at once, and ending all of them in bounded time.

Linux reports an end through a pidfd, so that nothing polls while all is well. Elsewhere ends are
noticed by asking ten times a second.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Final, Protocol

from drivetrain_toolkit.failures import CONSEQUENCE, STOP_CODES, Failure, first_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_toolkit.failures import RankState, RunDirectory

#: Process id of the launcher, in every process that a launcher of this package started.
PARENT: Final = "DRIVETRAIN_PARENT"

# In seconds. From the first failure to the end of the last rank it takes at most GRACE + TERMINATE
# + the kernel's time; a rank 0 that cannot be reached ends itself at HARD. Ten is promised.
GRACE: Final = 3.0
TERMINATE: Final = 2.0
HARD: Final = 7.0
#: How long ranks may take to stop after one of them was told to and did.
STOP: Final = 30.0
#: How often reports of live ranks are read.
REPORTS: Final = 0.25

_ENDED_BY_REQUEST = (*STOP_CODES, -signal.SIGINT, -signal.SIGTERM)


class Process(Protocol):
    """What is needed of ``subprocess.Popen`` and ``multiprocessing.Process`` alike."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """Its exit code (negative: a signal), or None while it runs."""
        ...


class Child:
    """One started rank.

    Args:
        rank: Its rank.
        process: The process.
        group: Whether it leads a process group of its own, with whatever it started itself.
    """

    def __init__(self, rank: int, process: Process, *, group: bool) -> None:
        self.rank = rank
        self.code: int | None = None
        self.ended_at = 0.0
        self.signalled = False
        self._process = process
        self._group = group
        self._handle = _pidfd(process.pid)

    @property
    def handle(self) -> int | None:
        """A file descriptor that becomes readable at its end, where the system has one."""
        return self._handle

    def poll(self) -> int | None:
        """Its exit code (negative: a signal), or None while it runs. Reaps it."""
        if self.code is None:
            self.code = self._process.poll()
            if self.code is not None:
                self.ended_at = time.monotonic()
                self.close()
        return self.code

    def send(self, number: int, *, ours: bool) -> None:
        """Send a signal if it runs. ``ours``: the death that follows is no news."""
        if self.poll() is not None:
            return
        self.signalled = self.signalled or ours
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def sweep(self) -> None:
        """Kill what it left behind in its group, such as data loading workers."""
        if self._group:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Release the descriptor. Safe to call twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Supervisor:
    """Watches the children of this process; one ``tick`` at a time, from one thread at a time.

    Args:
        children: The started ranks.
        directory: Where they report.
    """

    def __init__(self, children: Sequence[Child], directory: RunDirectory) -> None:
        self.children = children
        self.directory = directory
        #: How many calls of ``main`` each child has to finish before it may end.
        self.expected = 0
        #: Whether all were asked to stop, so that an end by a stop signal is no news.
        self.stopping = False
        #: The signal that ended a child which could not say that it stops, or 0. It was meant for
        #: the run: a person or manager stops one process and means all of them.
        self.stopped_by = 0
        self.problems: dict[int, Failure] = {}
        self._ending_since: float | None = None
        self._states: dict[int, RankState] = {}

    @property
    def live(self) -> list[Child]:
        """Children that have not ended."""
        return [child for child in self.children if child.code is None]

    @property
    def first(self) -> Failure | None:
        """The failure that explains the others, so far."""
        return first_of(self.problems.values())

    @property
    def news(self) -> list[Failure]:
        """The failures that a run is to be blamed for.

        Where it was stopped, a rank that lost those which had ended already is not among them.
        """
        stop = self.stopping or bool(self.stopped_by)
        return [each for each in self.problems.values() if not stop or each.weight != CONSEQUENCE]

    @property
    def ending_for(self) -> float:
        """Seconds since the end was decided; 0 if it was not."""
        return 0.0 if self._ending_since is None else time.monotonic() - self._ending_since

    def wait(self, timeout: float, *others: Any) -> list[Any]:
        """Return at a child's end, when one of ``others`` is readable, or after ``timeout``."""
        handles = [child.handle for child in self.live if child.handle is not None]
        if len(handles) < len(self.live):
            timeout = min(timeout, 0.1)
        if not handles and not others:
            time.sleep(timeout)
            return []
        return connection.wait([*handles, *others], timeout)

    def tick(self) -> None:
        """Look at every child once, and go on ending them if that was decided."""
        for child in self.children:
            child.poll()
            self._states[child.rank] = self.directory.read(child.rank)
            problem = self._problem(child, self._states[child.rank])
            if problem is not None and child.rank not in self.problems:
                self.problems[child.rank] = problem
                self.end()
        if self.stopping and len(self.live) < len(self.children):
            self.end(later=STOP)  # one has stopped; the others are about to
        self._advance()

    def end(self, *, later: float = 0.0) -> None:
        """Decide that all must end: by themselves within a grace period, then by force.

        Deciding it again can only bring the end forward.

        Args:
            later: Seconds until the grace period begins; a negative number shortens it.
        """
        since = time.monotonic() + later
        self._ending_since = min(since, self._ending_since or since)

    def spare(self) -> None:
        """Take ``end`` back, where every child lives on and none has been sent a signal.

        What they reported is forgotten: the script caught it, in every rank.
        """
        if all(child.code is None and not child.signalled for child in self.children):
            self._ending_since = None
            self.problems.clear()

    def all_left(self) -> bool:
        """Whether every live child has left the expected call of ``main``. After a ``tick``."""
        return all(self._states[child.rank].left >= self.expected for child in self.live)

    def waiting_in_vain(self) -> bool:
        """Whether a child began a call of ``main`` that this process will never join."""
        return any(self._states[each.rank].entered > self.expected for each in self.live)

    def _problem(self, child: Child, state: RankState) -> Failure | None:
        if state.failure is not None and state.left >= self.expected:
            return state.failure
        if child.code is None or child.signalled:
            return None
        finished = state.left >= self.expected
        if child.code == 0 and finished:
            return None
        if child.code in _ENDED_BY_REQUEST:
            # Asked to stop. After its part of the run that is no news; the others stop as well, if
            # only in a moment.
            if not self.stopping and not finished and not self.stopped_by:
                self.stopped_by = -child.code if child.code < 0 else child.code - 128
                self.end()
            return None
        return Failure.of_exit(child.rank, child.code, before_main=not finished)

    def _advance(self) -> None:
        if self._ending_since is None:
            return
        elapsed = self.ending_for
        for child in self.live:
            if elapsed >= GRACE + TERMINATE:
                child.send(signal.SIGKILL, ours=True)
            elif elapsed >= GRACE and not child.signalled:
                child.send(signal.SIGTERM, ours=True)


def stopped(number: int) -> str:
    """What is said where a signal ended a rank that could not stop by itself."""
    name = signal.Signals(number).name
    return f"The run stops: {name} ended one of its processes, which could not stop by itself.\n"


def follow(parent: int, directory: RunDirectory) -> None:
    """End this process soon after ``parent`` ended, however that was, and remove its directory.

    A thread waits for it. The kernel's own parent-death signal is not used: it also fires when only
    the *thread* that started the child ends, as under a launcher that runs in a worker thread.

    Raises:
        ProcessLookupError: ``parent`` has ended already.
    """
    os.kill(parent, 0)
    handle = _pidfd(parent)
    threading.Thread(
        target=_follow, args=(parent, handle, directory), name="drivetrain-parent", daemon=True
    ).start()


def _follow(parent: int, handle: int | None, directory: RunDirectory) -> None:
    if handle is not None:
        connection.wait([handle])
    else:
        while _exists(parent):
            time.sleep(1.0)
    directory.remove()
    os.kill(os.getpid(), signal.SIGTERM)  # a chance for the user's teardown
    time.sleep(GRACE + TERMINATE)
    os.kill(os.getpid(), signal.SIGKILL)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _pidfd(pid: int) -> int | None:
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # a kernel before 5.3, or a sandbox without the call
        return None


class PortReservation:
    """A free TCP port of this machine, kept free for a process of ours until it is closed.

    The socket stays bound without listening: the system gives the port to nobody who asks for any
    free one, while a server that asks for this very port, with address reuse as usual, gets it. So
    no time passes between choosing the port and rank 0 listening on it. Other systems than Linux
    see this differently; there the port is let go at once.
    """

    def __init__(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as reserved:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
            self.port: int = reserved.getsockname()[1]
            # Also let go when nobody launches the plan that the port was for.
            self._let_go = weakref.finalize(self, os.close, reserved.detach())
        if sys.platform != "linux":
            self.close()

    def close(self) -> None:
        """Let the port go. Safe to call twice."""
        self._let_go()
