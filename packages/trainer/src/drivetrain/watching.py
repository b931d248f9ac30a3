"""Watching over a run of several ranks: who failed first, who hangs, and where everybody is.

Each rank has one thread that looks at the side channel a few times a second. The first rank that
fails, or that sees no rank make progress, posts why. The others then say where they are, and come
back from whatever they wait in: their connections are cut, and if that does not help their main
thread is interrupted, and if that does not help the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    DataError,
    DrivetrainError,
    ProcessFailedError,
    SupportsAbort,
    SupportsTimeout,
)
from drivetrain_interfaces.whereabouts import is_consequence, mark, waited_in, waits_in

from drivetrain.progressing import Progressing

if TYPE_CHECKING:
    from drivetrain_interfaces import Collectives, SideChannel, World
    from typing_extensions import Self

    from drivetrain.loop import FitRun
    from drivetrain.signals import SignalWatch
    from drivetrain.stopping import StopRequest

log = logging.getLogger("drivetrain")

#: How often the side channel is looked at, in seconds.
POLL_SECONDS = 0.25
#: How long the first rank that fails waits for the others to say where they are, in seconds.
REPORT_SECONDS = 1.0
# From the news to the end by force, in seconds: what a rank has to come back by itself, after its
# connections were cut, and after its main thread was interrupted. Ten are promised.
_BY_ITSELF, _CUT, _INTERRUPTED = 1.0, 2.0, 3.5
#: A store that has not answered for so long, while nothing moves, is out of reach, in seconds.
_OUT_OF_REACH = 10.0
#: How much later than the watch the collectives themselves give up, in seconds.
_LATER = 60.0


class Watch:
    """Of one rank, from the first hook of a run to its last step together.

    Args:
        world: This process's place.
        collectives: What main threads wait in.
        channel: A connection of its own, or None in a world of one.
        run: Name of the run, the same on all ranks.
        signals: What can interrupt the main thread.
        hang_timeout: Seconds without progress on any rank that are a hang; None for no such limit.
    """

    def __init__(
        self,
        world: World,
        collectives: Collectives,
        channel: SideChannel | None,
        run: str,
        signals: SignalWatch,
        hang_timeout: float | None,
    ) -> None:
        self.run = run
        self.trouble: dict[str, Any] | None = None
        self._world = world
        self._collectives = collectives
        self._channel = channel
        self._signals = signals
        self._fit: FitRun | None = None
        self._progress = Progressing(world, channel, run, hang_timeout)
        self._over = threading.Event()
        self._answered = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._reporting = threading.Lock()
        self._reported = False

    def __enter__(self) -> Self:
        if self._channel is not None:
            targets = {"watch": self._look, "hang": self._look_at_the_clock}
            if self._progress.timeout is None:
                del targets["hang"]
            for name, target in targets.items():
                thread = threading.Thread(target=target, name=f"drivetrain-{name}", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:  # an error goes to ``failed`` first
            self.close()

    def close(self) -> None:
        """The ranks go separate ways from here. Safe to call twice."""
        self._over.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(POLL_SECONDS * 4)  # longer where the store does not answer
        self._threads.clear()

    def begin(self, stop: StopRequest, fit: FitRun | None = None) -> None:
        """From here on steps, and batches of evaluations, are expected."""
        self._fit = fit
        timeout = self._progress.timeout
        if timeout is not None and isinstance(self._collectives, SupportsTimeout):
            # The watch comes first, as it has more to say.
            self._collectives.set_timeout(timeout + _LATER)
        self._progress.begin(stop.place)

    def alive(self) -> None:
        """This rank makes progress, though it makes no step."""
        self._progress.alive()

    def check(self) -> None:
        """Raises ``ProcessFailedError`` once another rank is known to have failed."""
        if self.trouble is not None and self.trouble["by"] != self._world.rank:
            raise self._told(self.trouble)

    # What the main thread calls
    @property
    def place(self) -> str:
        """Where this rank is, in words."""
        if self._fit is None:
            return "an evaluation" if self._progress.place is not None else "set-up"
        progress = self._fit.progress
        return f"epoch {progress.epoch}, step {progress.global_step}"

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others, or learn from them; returns the error that this rank is to raise.

        It waits a moment: a rank that lost its connection hears why, and the rank that is the
        first to fail hears where the others are before its process ends.
        """
        mark(error, self.place)
        if self._channel is None or self._over.is_set() or not isinstance(error, Exception):
            self.close()
            return error
        try:
            return self._explained(error, self._channel)
        except DrivetrainError as lost:  # the store went with the rank that hosts it
            log.debug("the side channel is gone: %s", lost)
            return error
        finally:
            self.close()

    def end_epoch(self, epoch: int, windows: int) -> None:
        """Wait until all ranks ended this epoch; those whose loaders have no length may differ.

        Raises:
            DataError: Another rank has a window that this one has not.
            ProcessFailedError: Another rank failed.
        """
        channel = self._channel
        if channel is None:
            return
        channel.post(f"{self.run}/ended/{epoch}/{self._world.rank}", str(windows).encode())
        channel.post(f"{self.run}/ended", f"{epoch} {windows} {self._world.rank}".encode())
        said: dict[int, int] = {self._world.rank: windows}
        while len(said) < self._world.size:
            if self.trouble is not None:
                raise self._told(self.trouble)
            for rank in set(range(self._world.size)) - set(said):
                found = channel.peek(f"{self.run}/ended/{epoch}/{rank}")
                if found is not None:
                    said[rank] = int(found)
            self._over.wait(POLL_SECONDS / 10)
        most = max(said, key=lambda rank: said[rank])
        if said[most] != windows:
            raise _uneven(epoch, self._world.rank, windows, most)

    # The first failure
    def _explained(self, error: Exception, channel: SideChannel) -> BaseException:
        deadline = time.monotonic() + REPORT_SECONDS
        consequence = is_consequence(error)
        if consequence and self.trouble is not None:
            # What is to be said has been said, and the store may go at any moment.
            return self._told(self.trouble)
        while consequence and self.trouble is None and time.monotonic() < deadline:
            self._read(channel)
            time.sleep(POLL_SECONDS / 5)
        alike = {self._world.rank: f"{type(error).__name__}: {error}"}
        self._report(channel, error)
        first = self.trouble is None and self._read(channel) is None
        if first:
            self._post(channel, "failure", _headline(self._world.rank, self.place, error), error)
        if not self._all_failed(channel, alike) and isinstance(self._collectives, SupportsAbort):
            self._collectives.abort()
        assert self.trouble is not None
        return error if first or not is_consequence(error) else self._told(self.trouble)

    def _all_failed(self, channel: SideChannel, alike: dict[int, str]) -> bool:
        """Whether every rank made the same mistake; then each goes on as its own code decides."""
        assert self.trouble is not None
        others: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + REPORT_SECONDS
        failed: set[int] = {self._world.rank}
        while len(failed) < self._world.size and time.monotonic() < deadline:
            for rank in set(range(self._world.size)) - failed:
                found = channel.peek(f"{self.run}/report/{rank}")
                if found is not None:
                    others[rank] = json.loads(found)
                    failed |= {rank} if others[rank]["error"] else set()
            time.sleep(POLL_SECONDS / 10)
        alike.update({rank: report["error"] for rank, report in others.items()})
        same = len(alike) == self._world.size and len(set(alike.values())) == 1
        if self.trouble["by"] == self._world.rank and not same:
            lines = [_line(rank, others.get(rank)) for rank in range(self._world.size)]
            del lines[self._world.rank]
            log.error("When rank %d failed: %s.", self._world.rank, "; ".join(lines))
        return same

    def _post(
        self,
        channel: SideChannel,
        why: str,
        headline: str,
        error: Exception | None = None,
        numbers: tuple[int, ...] = (),
    ) -> None:
        trace = "" if error is None else "".join(traceback.format_exception(error))
        trouble = {
            "by": self._world.rank, "why": why, "headline": headline, "trace": trace,
            "numbers": numbers,
        }  # fmt: skip
        channel.post(f"{self.run}/trouble", json.dumps(trouble).encode())
        self.trouble = trouble

    def _read(self, channel: SideChannel) -> dict[str, Any] | None:
        found = channel.peek(f"{self.run}/trouble")
        if found is not None and self.trouble is None:
            self.trouble = json.loads(found)
        return self.trouble

    def _told(self, trouble: dict[str, Any]) -> DrivetrainError:
        if trouble["why"] == "uneven":
            return _uneven(*trouble["numbers"])
        told = ProcessFailedError(
            f"Rank {self._world.rank} was ended, because {trouble['headline']}."
            + (f"\n\n{trouble['trace']}" if trouble["trace"] else ""),
            f"Look at the output of rank {trouble['by']} first.",
        )
        mark(told, self.place)
        return told

    # Where everybody is
    def _report(self, channel: SideChannel, error: Exception | None = None) -> None:
        """Say where the main thread is, or how it failed. What it failed with is the last word."""
        with self._reporting:
            if self._reported:
                return
            self._reported = error is not None
            stack = _main_stack() if error is None else []
            report = {
                "host": socket.gethostname(),
                "place": self.place,
                "waits": waits_in(stack) if error is None else waited_in(error),
                "line": _innermost(stack),
                "error": "" if error is None else f"{type(error).__name__}: {error}",
                "stack": "".join(traceback.format_list(stack)),
            }
            channel.post(f"{self.run}/report/{self._world.rank}", json.dumps(report).encode())

    def _print_hang(self, channel: SideChannel, headline: str) -> None:
        """Where each rank is, and its stack, on standard error."""
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + REPORT_SECONDS
        while len(found) < self._world.size and time.monotonic() < deadline:
            for rank in set(range(self._world.size)) - set(found):
                said = channel.peek(f"{self.run}/report/{rank}")
                if said is not None:
                    found[rank] = json.loads(said)
            time.sleep(POLL_SECONDS / 5)
        lines = [f"\n{headline[0].upper()}{headline[1:]}. The ranks are here:"]
        lines += [f"  {_line(rank, found.get(rank))}" for rank in range(self._world.size)]
        for rank, report in sorted(found.items()):
            lines.append(f"\nStack of rank {rank} on {report['host']!r}, innermost call last:")
            lines.append(report["stack"].rstrip("\n"))
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()

    # Threads
    def _look(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            while not self._over.wait(POLL_SECONDS):
                trouble = self._read(channel)
                self._answered = time.monotonic()
                if trouble is not None:
                    self._report(channel)
                    self._come_back()
                    return
                self._compare_with_who_ended(channel)
                self._progress.share()
                if self._progress.stalled():
                    self._hang(channel)
        except DrivetrainError:
            # Rank 0, or torchrun's agent, is gone: at the end of a run a matter of moments.
            if not self._over.wait(2 * POLL_SECONDS):
                self.trouble = {
                    "by": 0, "why": "lost", "trace": "",
                    "headline": "the process that hosts the store, rank 0 or torchrun's agent, "
                    "has ended or is out of reach",
                }  # fmt: skip
                self._come_back()

    def _hang(self, channel: SideChannel) -> None:
        # The first of those that notice tells; ranks look one after the other.
        if self._over.wait(min(2.0, 0.2 * self._world.rank)) or self._read(channel) is not None:
            return
        headline = (
            f"no rank made progress for {self._progress.timeout:g} s, as rank {self._world.rank} "
            f"on {socket.gethostname()!r} noticed at {self.place}"
        )
        self._post(channel, "hang", headline)
        self._report(channel)
        self._print_hang(channel, headline)
        self._come_back()

    def _look_at_the_clock(self) -> None:
        """Notice a hang also where the store does not answer and the other thread hangs too."""
        timeout = self._progress.timeout
        assert timeout is not None
        while not self._over.wait(POLL_SECONDS):
            silent = time.monotonic() - self._answered
            if self._progress.idle > timeout and silent > _OUT_OF_REACH:
                break
        else:
            return
        headline = (
            f"rank {self._world.rank} on {socket.gethostname()!r} is cut off: nothing moves at "
            f"{self.place}, and the store at {self._world.address}:{self._world.port} has not "
            f"answered for {silent:.0f} s"
        )
        self.trouble = {"by": self._world.rank, "why": "lost", "headline": headline, "trace": ""}
        stack = "".join(traceback.format_list(_main_stack()))
        sys.stderr.write(f"\n{headline[0].upper()}{headline[1:]}. Its stack:\n{stack}")
        sys.stderr.flush()
        self._come_back()

    def _compare_with_who_ended(self, channel: SideChannel) -> None:
        """Notice that another rank's epoch is over while this one trains on in it."""
        fit, found = self._fit, channel.peek(f"{self.run}/ended")
        if fit is None or found is None:
            return
        epoch, windows, rank = map(int, found.split())
        if fit.progress.epoch == epoch and fit.entered > windows:
            self._post(channel, "uneven", "", numbers=(epoch, rank, windows, self._world.rank))

    def _come_back(self) -> None:
        """Free the main thread, with more force each time."""
        if self._over.wait(_BY_ITSELF):
            return
        if isinstance(self._collectives, SupportsAbort):
            self._collectives.abort()
        if self._over.wait(_CUT):
            return
        assert self.trouble is not None
        told = self._told(self.trouble)
        if not self._signals.interrupt(told) or self._over.wait(_INTERRUPTED):
            return
        sys.stderr.write(f"\n{type(told).__name__}: {told}\n")
        sys.stderr.flush()
        os._exit(1)


def _main_stack() -> list[traceback.FrameSummary]:
    """Where the main thread is."""
    frames = sys._current_frames()  # noqa: SLF001 - documented, for debugging as here
    main = frames.get(threading.main_thread().ident or 0)
    return list(traceback.extract_stack(main)) if main is not None else []


def _headline(rank: int, place: str, error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    who = f"rank {rank} on {socket.gethostname()!r} at {place}"
    if is_consequence(error):
        return f"{who} lost its connection to another rank, which said nothing ({text})"
    return f"{who} raised {type(error).__name__}: {text}"


def _line(rank: int, report: dict[str, Any] | None) -> str:
    if report is None:
        return f"rank {rank} does not answer: it has ended, or is out of reach"
    who = f"rank {rank} on {report['host']!r} at {report['place']}"
    if report["waits"]:
        return f"{who} waited in {report['waits']}"
    if report["error"]:
        return f"{who} ended with {report['error'].splitlines()[0]}"
    return f"{who} was in {report['line']}"


def _innermost(stack: list[traceback.FrameSummary]) -> str:
    return f"{stack[-1].name} ({stack[-1].filename}:{stack[-1].lineno})" if stack else "no code"


def _uneven(epoch: int, short: int, windows: int, longer: int) -> DataError:
    return DataError(
        f"The train loader of rank {short} ended after {windows} steps of epoch {epoch}, and rank "
        f"{longer} has more.",
        "Give every rank equally many batches, such as by limit_train_batches.",
    )
