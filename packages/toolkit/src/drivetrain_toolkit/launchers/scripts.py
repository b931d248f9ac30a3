"""The script launcher: this process is rank 0, and the others run the same script again."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import ClusterError
from drivetrain_interfaces.launcher import LaunchPlan

from drivetrain_toolkit.environments import LAUNCHED
from drivetrain_toolkit.failures import (
    CONSEQUENCE,
    DIRECTORY,
    Failure,
    RunDirectory,
    is_stop,
    process_failed,
)
from drivetrain_toolkit.failures import reported as report_main
from drivetrain_toolkit.launchers import plans
from drivetrain_toolkit.launchers.ranks import SCRIPT, run_as_rank
from drivetrain_toolkit.processes import (
    GRACE,
    HARD,
    PARENT,
    REPORTS,
    STOP,
    Child,
    Supervisor,
    stopped,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.launcher import LaunchRequest

    from drivetrain_toolkit.processes import PortReservation

_TAKES_ARGUMENT: Final = "WX"


class ScriptLauncher:
    """Re-runs the script for every further rank of this machine; the caller becomes the first.

    The other ranks run the whole script, also what follows the launch, and end with it. Rank 0 sets
    the variables of its place in its own environment too, so that a second launch in the same
    script finds the ranks running; it then joins them.
    """

    name = SCRIPT

    def __init__(self) -> None:
        self._reservation: PortReservation | None = None

    @property
    def interactive(self) -> bool:
        """False: a prompt has no script to run again."""
        return False

    @property
    def in_place(self) -> bool:
        """True: rank 0 is the calling process."""
        return True

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The ranks of this machine and the command that the others run.

        Raises:
            ClusterError: The request cannot be met, or there is no script to run again.
        """
        plans.check_request(request, self.name)
        if os.environ.get(LAUNCHED) == SCRIPT:
            return self._plan_to_join(request)
        plans.refuse_inside_a_rank(self.name)
        command = this_script() if request.local_size > 1 else Script((), os.getcwd())
        self._reservation = plans.reserve(request)
        return plans.make_plan(
            request, self.name, reservation=self._reservation, command=command.arguments
        )

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Start the others, run ``main`` here as the first rank, and return its result.

        Raises:
            ProcessFailedError: Another rank failed first. The other processes have ended.
        """
        if os.environ.get(LAUNCHED) == SCRIPT or len(plan.worlds) == 1 == plan.worlds[0].size:
            return run_in_this_process(main, plan.worlds[0])
        _Current.run = run = ScriptRun(plan, self._reservation)
        return run.run(main, plan.worlds[0])

    def _plan_to_join(self, request: LaunchRequest) -> LaunchPlan:
        world = plans.world_here()
        assert world is not None, "LAUNCHED is evidence"
        plans.check_fits(request, world)
        return LaunchPlan(self.name, (world,))


def run_in_this_process(main: Callable[[World], Any], world: World) -> Any:
    """Call ``main`` as a rank that exists, with the supervision that its launcher provides."""
    run = _Current.run
    if run is not None and run.process == os.getpid():
        return run.run(main, world)
    return run_as_rank(main, world)


class _Current:
    """The run whose rank 0 this process is. One at most: a process has one place."""

    run: ScriptRun | None = None


class ScriptRun:
    """The other ranks of a script, from their start to the end of this process.

    Args:
        plan: What to start.
        reservation: The port that rank 0 is going to listen on; held as long as the run.
    """

    def __init__(self, plan: LaunchPlan, reservation: PortReservation | None) -> None:
        self.process = os.getpid()
        self._world, self._size = plan.worlds[0], plan.worlds[0].size
        self._reservation = reservation
        self._raised = False
        directory = RunDirectory.create()
        self._directory = directory
        before = dict(os.environ)
        extra = {**dict(plan.environment), DIRECTORY: directory.path, PARENT: str(self.process)}
        children: list[Child] = []
        self._supervisor = Supervisor(children, directory)
        try:
            for world in plan.worlds[1:]:
                variables = {**before, **extra, **plans.place(world, SCRIPT)}
                children.append(_start(plan.command, world, variables))
        except BaseException:
            self._end_at_once()
            raise
        os.environ.update({**extra, **plans.place(self._world, SCRIPT)})
        atexit.register(self._finish)

    def run(self, main: Callable[[World], Any], world: World) -> Any:
        """One call of ``main`` in all ranks; the others make the same calls in the same order."""
        supervisor = self._supervisor
        supervisor.expected = self._directory.read(world.rank).entered + 1
        supervisor.tick()
        if supervisor.problems:
            raise self._failed()
        if supervisor.stopped_by:
            raise self._ended()
        try:
            with _Watchdog(supervisor, self._size):
                result = report_main(main, world, self._directory)
        except BaseException as error:
            self._settle(error)
            raise
        self._settle(None)
        return result

    def _settle(self, error: BaseException | None) -> None:
        """Wait until no other rank is left inside ``main``; raise if one of them failed first.

        Raises:
            SystemExit: Another rank was ended by a stop signal before it could say so.
        """
        supervisor = self._supervisor
        if error is not None:
            supervisor.stopping = is_stop(error)
            supervisor.end(later=STOP if is_stop(error) else 0.0)
        supervisor.tick()
        while not supervisor.all_left():
            supervisor.wait(REPORTS / 5)
            supervisor.tick()
        own = self._directory.read(self._world.rank).failure
        if supervisor.stopped_by and (own is None or own.weight == CONSEQUENCE):
            raise self._ended() from error
        if error is not None and is_stop(error):
            supervisor.spare()
            return
        first = supervisor.first
        if first is None or (own and (own.same_error(first) or _precedes(own, first))):
            supervisor.spare()
            self._raised = own is not None
            return
        raise self._failed(own) from error

    def _ended(self) -> SystemExit:
        """The end of this process after a stop signal to another one."""
        self._raised = True
        sys.stderr.write(stopped(self._supervisor.stopped_by))
        return SystemExit(128 + self._supervisor.stopped_by)

    def _failed(self, *own: Failure | None) -> Exception:
        """The error to raise, once all other ranks have ended."""
        supervisor = self._supervisor
        supervisor.end()
        while supervisor.live:
            supervisor.wait(REPORTS / 5)
            supervisor.tick()
        self._raised = True
        failures = [*supervisor.problems.values(), *(each for each in own if each)]
        return process_failed(failures, self._size)

    def _finish(self) -> None:
        """At exit: wait for the other ranks, and fail if one of them did."""
        if os.getpid() != self.process:
            return
        supervisor = self._supervisor
        if getattr(sys, "last_value", None) is not None:  # this process ends by an exception
            supervisor.end()
        supervisor.tick()
        while supervisor.live:
            if supervisor.waiting_in_vain():
                supervisor.end(later=-GRACE)
            supervisor.wait(REPORTS)
            supervisor.tick()
        self._close()
        if supervisor.stopped_by and not self._raised and not supervisor.news:
            _exit_saying(stopped(supervisor.stopped_by), 128 + supervisor.stopped_by)
        if supervisor.problems and not self._raised and not supervisor.stopping:
            _exit_with(process_failed(supervisor.problems.values(), self._size))

    def _end_at_once(self) -> None:
        self._supervisor.end(later=-GRACE)
        self._supervisor.tick()
        while self._supervisor.live:
            self._supervisor.wait(REPORTS / 5)
            self._supervisor.tick()
        self._close()

    def _close(self) -> None:
        self._directory.remove()
        if self._reservation is not None:
            self._reservation.close()


class _Watchdog:
    """Watches the other ranks from a thread while rank 0 is inside ``main``.

    Rank 0 may be waiting in a library's C code for a rank that is gone. If it does not come back in
    time the thread shows the first failure and ends the process, since nothing else can.
    """

    def __init__(self, supervisor: Supervisor, size: int) -> None:
        self._supervisor = supervisor
        self._size = size
        self._over, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="drivetrain-ranks", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        os.close(self._stop)
        self._thread.join()
        os.close(self._over)

    def _watch(self) -> None:
        supervisor = self._supervisor
        while self._over not in supervisor.wait(REPORTS, self._over):
            supervisor.tick()
            if supervisor.ending_for >= HARD and not supervisor.live:
                supervisor.directory.remove()
                if supervisor.stopped_by and not supervisor.news:
                    _exit_saying(stopped(supervisor.stopped_by), 128 + supervisor.stopped_by)
                _exit_with(process_failed(supervisor.problems.values(), self._size))


@dataclass(frozen=True, slots=True)
class Script:
    """How this process was started, so that it can be again.

    Attributes:
        arguments: The command, with the interpreter's options.
        folder: Where to start it.
    """

    arguments: tuple[str, ...]
    folder: str


def this_script() -> Script:
    """The command that runs the script of this process again.

    Raises:
        ClusterError: It runs no script: a prompt, a notebook, ``python -c``, or standard input.
    """
    given = tuple(sys.orig_argv)
    kind, index = _what_runs(given)
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if hasattr(sys, "ps1") or kind in ("c", "-", "") or not file:
        what = {"c": "python -c", "-": "standard input"}.get(kind, "a prompt or a notebook")
        raise ClusterError(
            f"The 'script' launcher runs this script again for each rank, and there is none: this "
            f"is {what}.",
            "Put the code into a file and run that, or choose launcher='fork' or 'spawn'.",
        )
    if kind == "m":
        return Script((sys.executable, *given[1:]), os.getcwd())
    # The script may have changed the current folder since it started; where a relative name was
    # given, the start folder is what the absolute name has in front of it.
    folder = os.getcwd()
    name = given[index]
    if not os.path.isabs(name) and file.endswith(os.sep + name):
        folder = file[: -len(name)]
    return Script((sys.executable, *given[1:]), folder)


def _what_runs(given: Sequence[str]) -> tuple[str, int]:
    """``("c" | "m" | "-" | "file" | "", position)`` in the interpreter's command line."""
    positions = iter(range(1, len(given)))
    for index in positions:
        option = given[index]
        if option == "-":
            return "-", index
        if not option.startswith("-"):
            return "file", index
        if option == "--check-hash-based-pycs":
            next(positions, None)
        elif not option.startswith("--"):
            letter = _deciding_letter(option, positions)
            if letter:
                return letter, index
    return "", len(given)


def _deciding_letter(option: str, positions: Iterator[int]) -> str:
    """``c`` or ``m`` in a cluster of short options; skips the argument of one that takes one."""
    for place, letter in enumerate(option[1:], 2):
        if letter in "cm":
            return letter
        if letter in _TAKES_ARGUMENT:
            if place == len(option):
                next(positions, None)
            return ""
    return ""


def _start(command: Sequence[str], world: World, variables: Mapping[str, str]) -> Child:
    # Same process group: Ctrl-C in a terminal reaches every rank, once. No standard input: only
    # one of several readers would get a line.
    process = subprocess.Popen(  # noqa: S603 - the command that the user has run already
        command, env=dict(variables), cwd=this_script().folder, stdin=subprocess.DEVNULL
    )
    return Child(world.rank, process, group=False)


def _precedes(own: Failure, first: Failure) -> bool:
    return (own.weight, own.when) <= (first.weight, first.when)


def _exit_with(error: Exception) -> None:
    _exit_saying(f"\n{type(error).__name__}: {error}\n", 1)


def _exit_saying(text: str, code: int) -> None:
    """End this process at once: its main thread cannot or will not any more."""
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(code)
