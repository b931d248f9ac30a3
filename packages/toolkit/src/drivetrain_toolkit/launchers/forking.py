"""Spawn, fork and forkserver: every rank is a child, and this process watches over them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.errors import ClusterError

from drivetrain_toolkit.failures import (
    DIRECTORY,
    STOP_CODES,
    STOP_SIGNALS,
    RunDirectory,
    is_stop,
    process_failed,
    reported,
)
from drivetrain_toolkit.launchers import plans
from drivetrain_toolkit.launchers.pickles import pickled, pickled_result, unpickled
from drivetrain_toolkit.launchers.ranks import follow_launcher
from drivetrain_toolkit.processes import GRACE, PARENT, REPORTS, Child, Supervisor, stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection
    from types import FrameType

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.launcher import LaunchPlan, LaunchRequest
    from typing_extensions import Self

    from drivetrain_toolkit.processes import PortReservation, Process


_ALWAYS_STOP = (signal.SIGINT, signal.SIGTERM)


class ChildrenLauncher:
    """What launchers share whose ranks are children."""

    name = ""
    environment: tuple[tuple[str, str], ...] = ()

    def __init__(self) -> None:
        self._reservation: PortReservation | None = None

    @property
    def in_place(self) -> bool:
        """False: rank 0 is a child, so objects here keep the state they have."""
        return False

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The ranks of this machine.

        Raises:
            ClusterError: The request cannot be met, or this process is a rank already.
        """
        plans.check_request(request, self.name)
        plans.refuse_inside_a_rank(self.name)
        self._check_possible()
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise ClusterError(
                f"The {self.name!r} launcher was asked for while a process that it started was "
                "importing the script.",
                "Put what the script does under: if __name__ == '__main__'.",
            )
        self._reservation = plans.reserve(request)
        return plans.make_plan(
            request, self.name, reservation=self._reservation, environment=self._extra()
        )

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Run ``main`` in every process of the plan and return what rank 0 returned, by pickle.

        A stop signal is passed on to every rank once. When they have stopped this process ends as
        the signal would have ended it, unless rank 0 returned a result.

        Raises:
            ProcessFailedError: A rank failed. All processes have ended.
            UserCodeError: ``main`` or its result cannot be pickled.
            KeyboardInterrupt: The run was stopped by SIGINT.
            SystemExit: The run was stopped by SIGTERM (exit code 143).
        """
        try:
            return self._family(plan, self._task(main)).run()
        finally:
            if self._reservation is not None:
                self._reservation.close()

    def _extra(self) -> tuple[tuple[str, str], ...]:
        return ()

    def _check_possible(self) -> None:
        """Refuse what this system or installation cannot do, before anything is planned."""
        if self.name not in multiprocessing.get_all_start_methods():
            raise ClusterError(
                f"The {self.name!r} launcher was asked for, and {sys.platform} cannot start "
                f"processes that way.",
                "Choose launcher='spawn' or 'script'.",
            )

    def _task(self, main: Callable[[World], Any]) -> Callable[[World], Any] | bytes:
        raise NotImplementedError

    def _family(self, plan: LaunchPlan, task: Callable[[World], Any] | bytes) -> Family:
        return Family(self.name, plan, task)


class SpawnLauncher(ChildrenLauncher):
    """Starts fresh interpreters, which import what ``main`` needs by name."""

    name = "spawn"

    @property
    def interactive(self) -> bool:
        """True: no script is run again. What was defined at the prompt itself is refused."""
        return True

    def _task(self, main: Callable[[World], Any]) -> bytes:
        return pickled(main, self.name)


class ForkServerLauncher(SpawnLauncher):
    """Forks from a server that holds no threads and has imported torch, so that ranks start soon.

    The server is started at the first launch and ends with this process. Like ``spawn`` it imports
    what ``main`` needs by name, and like ``spawn`` it sees nothing of what this process holds.
    """

    name = "forkserver"

    def _family(self, plan: LaunchPlan, task: Callable[[World], Any] | bytes) -> Family:
        # Only a server that does not run yet looks at this. Names that cannot be imported there
        # are left out without a word, which is what a rank that imports them itself needs.
        multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "torch"])
        return super()._family(plan, task)


class ForkLauncher(ChildrenLauncher):
    """Copies this process, with all that it holds. The quickest start, and works with any object.

    Threads are not copied. OpenMP keeps its worker threads for the life of a process: in a copy the
    first parallel region waits for workers that do not exist. So copies compute with one thread,
    unless the user has set ``OMP_NUM_THREADS``, and with it taken the decision.
    """

    name = "fork"

    @property
    def interactive(self) -> bool:
        """True: nothing is run again, and nothing is pickled on the way in."""
        return True

    def _extra(self) -> tuple[tuple[str, str], ...]:
        return () if os.environ.get("OMP_NUM_THREADS") else (("OMP_NUM_THREADS", "1"),)

    def _task(self, main: Callable[[World], Any]) -> Callable[[World], Any]:
        return main


class Started:
    """A ``multiprocessing.Process`` with the interface of ``processes.Process``."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        code: int | None = self._process.exitcode
        return code


@dataclass(frozen=True, slots=True)
class ChildPlace:
    """What a child is told besides its task."""

    world: World
    variables: Mapping[str, str]
    forked: bool = False
    by_value: bool = False


class Family:
    """One launch: the children, the pipe for the result, and the signals in between."""

    def __init__(self, method: str, plan: LaunchPlan, task: Callable[[World], Any] | bytes) -> None:
        self._plan = plan
        self._method = method
        self._task = task
        self._signals: list[int] = []
        self._sent = 0
        self._answer: bytes | int | None = None
        self._directory = RunDirectory.create()
        self._children: list[Child] = []
        self._supervisor = Supervisor(self._children, self._directory)
        self._supervisor.expected = 1
        self._receiving: Connection | None = None

    def run(self) -> Any:
        """Start all, watch them, and return what rank 0 returned."""
        with _Signals(self._signals) as noted:
            try:
                self._start(noted)
                self._watch(noted.receiving)
            finally:
                self._end()
        if news := self._supervisor.news:
            raise process_failed(news, self._plan.worlds[0].size)
        return self._outcome()

    def _start(self, noted: _Signals) -> None:
        forked = self._method == "fork"
        common = {
            **dict(self._plan.environment),
            DIRECTORY: self._directory.path,
            PARENT: str(os.getpid()),
        }
        before = noted.previous if forked else {}
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any fork with threads. Ours is what was asked for.
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            # Rank 0 last, and its pipe made just then: a copy of the writing end in another child
            # would hide that rank 0 is gone.
            for world in reversed(self._plan.worlds):
                variables = {**common, **plans.place(world, self._method)}
                sending = None
                if world is self._plan.worlds[0]:
                    self._receiving, sending = multiprocessing.Pipe(duplex=False)
                process = self._begin(ChildPlace(world, variables, forked), sending, before)
                self._children.append(Child(world.rank, process, group=True))
                if sending is not None:
                    sending.close()

    def _begin(
        self, place: ChildPlace, sending: Connection | None, before: Mapping[int, Any]
    ) -> Process:
        """Start the process of one place."""
        context: Any = multiprocessing.get_context(self._method)
        process = context.Process(
            target=run_child,
            args=(self._task, place, sending, before),
            name=f"rank {place.world.rank}",
        )
        process.start()
        return Started(process)

    def _watch(self, noted: int) -> None:
        supervisor = self._supervisor
        pipe = self._receiving
        while supervisor.live or pipe is not None:
            others = [noted] if pipe is None else [noted, pipe]
            ready = supervisor.wait(REPORTS, *others)
            if noted in ready:
                os.read(noted, 1)
                self._pass_on()
            if pipe is not None and pipe in ready:
                self._receive(pipe)
                pipe = None
            supervisor.tick()
            if not supervisor.live and pipe is not None and not pipe.poll():
                pipe = None

    def _receive(self, pipe: Connection) -> None:
        with suppress(EOFError, OSError):  # rank 0 died before or while it sent: its exit says why
            self._answer = pipe.recv()

    def _pass_on(self) -> None:
        """Send signals that came here to every rank; a second Ctrl-C ends them without patience."""
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGINT == self._sent:
                self._supervisor.end(later=-GRACE)
                return
            if number in _ALWAYS_STOP:
                self._sent = self._sent or number
                self._supervisor.stopping = True
            for child in self._children:
                child.send(number, ours=False)

    def _end(self) -> None:
        """Leave nothing behind, however the launch ended."""
        supervisor = self._supervisor
        failed = bool(supervisor.problems) or bool(supervisor.live)
        if supervisor.live:
            supervisor.end(later=-GRACE)
        while supervisor.live:
            supervisor.tick()
            supervisor.wait(REPORTS / 5)
        for child in self._children:
            if failed or child.signalled or child.code != 0:
                child.sweep()
            child.close()
        if self._receiving is not None:
            self._receiving.close()
        self._directory.remove()

    def _outcome(self) -> Any:
        """The result of rank 0; where it has none, the run was stopped."""
        if isinstance(self._answer, bytes):
            return unpickled(self._answer, "The result of rank 0")
        if self._supervisor.stopped_by and not self._sent:
            sys.stderr.write(stopped(self._supervisor.stopped_by))
        number = self._sent or self._supervisor.stopped_by or signal.SIGTERM
        if isinstance(self._answer, int) and self._answer:
            number = self._answer - 128
        code = 128 + number
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(code)


class _Signals:
    """Collects signals for the ranks while it is entered, and wakes the watching loop.

    Signals other than SIGINT and SIGTERM are collected where nobody else handles them: the policy
    of the run, in the ranks, says what they mean.

    In a thread other than the main one Python allows no handlers; then signals do what they did.
    """

    def __init__(self, seen: list[int]) -> None:
        self._seen = seen
        self.previous: dict[int, Any] = {}
        self.receiving, self._sending = os.pipe()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number in _ALWAYS_STOP or signal.getsignal(number) is signal.SIG_DFL:
                    self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.close(self.receiving)
        os.close(self._sending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._seen.append(number)
        os.write(self._sending, b"!")


def run_child(
    task: Callable[[World], Any] | bytes,
    place: ChildPlace,
    pipe: Connection | None,
    handlers: Mapping[int, Any],
) -> None:
    """What runs in a started process: become the rank, call ``main``, and report."""
    # A process group of its own: Ctrl-C in a terminal then reaches the launcher alone, which passes
    # it on once; and whatever the rank starts can be ended with it.
    os.setpgid(0, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.update(place.variables)
    if place.forked:
        _one_thread(place.variables)
    directory = RunDirectory(place.variables[DIRECTORY])
    follow_launcher(int(place.variables[PARENT]), directory)

    def main(world: World) -> Any:
        function = unpickled(task, "main") if isinstance(task, bytes) else task
        result = function(world)
        # Pickled here, so that a result that cannot be counts as this rank's failure.
        return pickled_result(result, by_value=place.by_value) if pipe is not None else None

    try:
        result = reported(main, place.world, directory)
    except BaseException as error:  # noqa: BLE001 - reported, and the exit code says the rest
        sys.stdout.flush()
        code = _stop_code(error) if is_stop(error) else 1
        if is_stop(error) and pipe is not None:
            pipe.send(code)
        raise SystemExit(code) from None
    if pipe is not None:
        pipe.send(result)


def _stop_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return STOP_CODES[0]
    code = getattr(error, "code", 0)
    return code if isinstance(code, int) else 0


def _one_thread(variables: Mapping[str, str]) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and variables.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
