"""What each rank reports about itself, and which of several failures came first.

The ranks of one machine share a run directory with one small JSON file per rank. A rank writes when
it enters ``main``, when it leaves, and how; the process that supervises it reads. Files, because
they outlive a process that dies in any way, and need no connection that could break with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import ProcessFailedError
from drivetrain_interfaces.whereabouts import is_consequence, place_of, waited_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from drivetrain_interfaces.cluster import World

#: Path of the run directory, in every process that a launcher of this package started.
DIRECTORY: Final = "DRIVETRAIN_FAILURES"

#: Signals that ask a run to stop. The first two end a process that does not handle them, and mean
#: the same then; the others only where the run's own policy says so.
STOP_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
#: Exit codes of a process that stopped because it was asked to: 128 + signal.
STOP_CODES: Final[tuple[int, ...]] = tuple(128 + number for number in STOP_SIGNALS)

# Sorted by what they say about the cause. A rank that lost its peers reports a broken collective,
# often before the peer that broke it has finished its own clean-up and reported the reason.
KILLED, CAUSE, CONSEQUENCE = range(3)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


@dataclass(frozen=True, slots=True)
class Failure:
    """How one rank failed.

    Attributes:
        rank: The rank.
        host: Its machine.
        kind: The exception's class name; empty where the process ended without one.
        message: The exception's text, or what is known of the end.
        trace: The traceback as text; empty where there is none.
        weight: ``KILLED``, ``CAUSE`` or ``CONSEQUENCE``.
        when: Time on the machine's monotonic clock, in nanoseconds; comparable between its ranks.
        place: Where in the run, such as ``"epoch 1, step 7"``; empty where that is not known.
        waited: The collective that the error came out of; empty if it was in none.
    """

    rank: int
    host: str
    kind: str
    message: str
    trace: str
    weight: int
    when: int
    place: str = ""
    waited: str = ""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure of this process, which is handling ``error``."""
        return cls(
            rank=rank,
            host=socket.gethostname(),
            kind=type(error).__name__,
            message=str(error),
            trace="".join(traceback.format_exception(type(error), error, _below_us(error))),
            weight=CONSEQUENCE if is_consequence(error) else CAUSE,
            when=time.monotonic_ns(),
            place=place_of(error),
            waited=waited_in(error),
        )

    @classmethod
    def of_exit(cls, rank: int, code: int, *, before_main: bool) -> Failure:
        """The failure of a child that ended with ``code`` (negative: a signal) and no report."""
        known = code < 0 and -code in tuple(signal.Signals)
        name = signal.Signals(-code).name if known else f"signal {-code}"
        text = f"was ended by {name}" if code < 0 else f"ended with exit code {code}"
        if before_main:
            text += " before it finished its part of the run"
        # A library may abort a process whose peers are gone; no other signal comes from the run.
        killed = code < 0 and -code not in (signal.SIGABRT, signal.SIGTERM, signal.SIGINT)
        return cls(
            rank=rank,
            host=socket.gethostname(),
            kind="",
            message=text,
            trace="",
            weight=KILLED if killed else CAUSE,
            when=time.monotonic_ns(),
        )

    @property
    def sequel(self) -> str:
        """One line about a failure that another one explains."""
        if self.weight == CONSEQUENCE and self.waited:
            where = f" at {self.place}" if self.place else ""
            return f"rank {self.rank} on {self.host!r}{where} waited in {self.waited}"
        return self.headline.splitlines()[0]

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was what was missing."""
        text = self.message.lower()
        return self.kind in {"MemoryError", "OutOfMemoryError"} or any(
            part in text for part in _OUT_OF_MEMORY
        )

    @property
    def headline(self) -> str:
        """One line without the traceback."""
        who = f"rank {self.rank} on {self.host!r}" + (f" at {self.place}" if self.place else "")
        return f"{who} raised {self.kind}: {self.message}" if self.kind else f"{who} {self.message}"

    def same_error(self, other: Failure) -> bool:
        """Whether both ranks failed alike, as with a mistake that all of them make."""
        return (self.kind, self.message) == (other.kind, other.message)


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank last said. Counts calls of ``main`` in its process.

    Attributes:
        entered: Calls begun.
        left: Calls ended, in whatever way.
        stopped: Whether the last one ended because the rank was asked to stop.
        failure: How the last one failed, if it did.
    """

    entered: int = 0
    left: int = 0
    stopped: bool = False
    failure: Failure | None = None


def _below_us(error: BaseException) -> TracebackType | None:
    """The traceback from the user's first frame on; all of it if there is none."""
    ours = os.path.dirname(__file__)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(ours):
        trace = trace.tb_next
    return trace or error.__traceback__


class RunDirectory:
    """The directory that the ranks of one machine share.

    Args:
        path: An existing directory.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def create(cls) -> RunDirectory:
        """A new one in the system's place for temporary files."""
        return cls(tempfile.mkdtemp(prefix="drivetrain-run-"))

    def write(self, rank: int, state: RankState) -> None:
        """Replace what ``rank`` said. A reader sees the old or the new, never a part.

        The directory is gone once nobody is going to read it; then nothing is said.
        """
        target = self._file(rank)
        draft = target.with_suffix(".draft")
        with suppress(FileNotFoundError):
            draft.write_text(json.dumps(asdict(state)), encoding="utf-8")
            draft.replace(target)

    def read(self, rank: int) -> RankState:
        """What ``rank`` last said; the empty state where it said nothing."""
        try:
            text = self._file(rank).read_text(encoding="utf-8")
        except FileNotFoundError:
            return RankState()
        fields: dict[str, Any] = json.loads(text)
        failure = fields.pop("failure")
        return RankState(**fields, failure=Failure(**failure) if failure else None)

    def remove(self) -> None:
        """Delete it. Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, rank: int) -> Path:
        return Path(self.path, f"rank-{rank}.json")


def reported(main: Callable[[World], Any], world: World, directory: RunDirectory) -> Any:
    """Call ``main`` and keep the rank's file up to date around it; its errors pass through."""
    before = directory.read(world.rank)
    state = RankState(entered=before.entered + 1, left=before.left)
    directory.write(world.rank, state)
    done = replace(state, left=state.entered)
    try:
        result = main(world)
    except BaseException as error:
        failure = None if is_stop(error) else Failure.of(error, world.rank)
        directory.write(world.rank, replace(done, stopped=is_stop(error), failure=failure))
        raise
    directory.write(world.rank, done)
    return result


def is_stop(error: BaseException) -> bool:
    """Whether this is the end of a process that was asked to stop, rather than a failure."""
    if isinstance(error, SystemExit):
        return error.code in (None, 0, *STOP_CODES)
    return isinstance(error, KeyboardInterrupt)


def first_of(failures: Iterable[Failure]) -> Failure | None:
    """The failure that explains the others: by weight, then by time. None if there is none."""
    return min(failures, key=lambda each: (each.weight, each.when), default=None)


def process_failed(failures: Iterable[Failure], size: int) -> ProcessFailedError:
    """The error for a run of ``size`` ranks: the first failure in full, the others in a line."""
    every = sorted(failures, key=lambda each: (each.weight, each.when))
    first, later = every[0], every[1:]
    text = f"A run of {size} processes was ended, because {first.headline}"
    if not text.endswith((".", "!", "?")):
        text += "."
    if first.trace:
        text += f"\n\nTraceback of rank {first.rank}:\n{first.trace}"
    text += "".join(f"\nThen {each.sequel}" for each in later)
    return ProcessFailedError(text, _advice(first))


def _advice(first: Failure) -> str:
    if first.weight == KILLED:
        return "\nLook in the system's log for who ended it; the kernel does so when memory is out."
    if first.out_of_memory:
        return (
            f"\nGive rank {first.rank} less to hold, such as a smaller batch, or its machine fewer "
            "processes."
        )
    if not first.kind:
        return f"\nLook at what rank {first.rank} printed before it ended."
    return f"\nCorrect the error of rank {first.rank} first."
