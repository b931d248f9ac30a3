"""Failing, stopping and dying ranks. Rules N6 to N12 of docs/contracts/launcher.md.

Every run is a script in a process of its own, without torch, so that it takes parts of a second.
After each one, no process that it started and no file that it made may be left. Most wait less long
for ranks that are to end than users do; those that prove the promised ten seconds do not.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.errors import ProcessFailedError

from drivetrain_toolkit.failures import (
    CAUSE,
    CONSEQUENCE,
    KILLED,
    Failure,
    RankState,
    RunDirectory,
    first_of,
    is_consequence,
    is_stop,
    process_failed,
    reported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAUNCHERS = ("script", "spawn", "fork")
ALL_END_WITHIN = 10.0
MARK = "DRIVETRAIN_TEST_MARK"

HEAD = """
import ctypes, os, signal, subprocess, sys, time
from drivetrain_interfaces.errors import DrivetrainError
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import processes
if os.environ["QUICK"]:
    processes.GRACE, processes.TERMINATE, processes.HARD = 0.6, 0.4, 1.4
from drivetrain_toolkit import launchers

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def blocked():
    while True:
        signal.pause()

def stop_cleanly():
    def handler(number, frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
"""
TAIL = """
def launch():
    launcher = getattr(launchers, sys.argv[1])()
    return launcher.launch(main, launcher.plan(LaunchRequest(local_size=2)))
"""
PLAIN = """
if __name__ == "__main__":
    say("result", launch())
"""


@dataclass
class Ended:
    """A run that is over."""

    code: int
    out: str
    err: str
    seconds: float


class Run:
    """A script that has been started, and everything that it started."""

    def __init__(self, folder: Path, launcher: str, body: str, last: str, *, quick: bool) -> None:
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        script = folder / "train.py"
        script.write_text(HEAD + textwrap.dedent(body) + TAIL + textwrap.dedent(last))
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, str(script), launcher],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **clean,
                MARK: self.mark,
                "TMPDIR": str(self.temporary),
                "QUICK": "1" if quick else "",
            },
            start_new_session=True,
        )
        self.began = time.monotonic()

    def lines(self, count: int) -> list[str]:
        """The next lines that its ranks said, in text order."""
        assert self.process.stdout is not None
        return sorted(self.process.stdout.readline().strip() for _ in range(count))

    def end(self) -> Ended:
        out, err = self.process.communicate(timeout=60)
        return Ended(self.process.returncode, out, err, time.monotonic() - self.began)

    def left(self) -> list[int]:
        """Processes of this run that exist, zombies aside: those are somebody else's to collect."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if mine:
                found.append(int(folder.name))
        return found

    def wait_until_alone(self) -> None:
        deadline = time.monotonic() + ALL_END_WITHIN
        while self.left() and time.monotonic() < deadline:
            os.sched_yield()
        assert self.left() == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(launcher: str, body: str, last: str = PLAIN, *, quick: bool = True) -> Run:
        runs.append(Run(tmp_path, launcher, body, last, quick=quick))
        return runs[-1]

    yield begin
    for run in runs:
        left = run.left()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        run.process.communicate(timeout=10)
        assert left == [], "processes were left"


@pytest.fixture
def fail(start: Callable[..., Run]) -> Callable[..., Ended]:
    def run(launcher: str, body: str, last: str = PLAIN, *, quick: bool = True) -> Ended:
        begun = start(launcher, body, last, quick=quick)
        done = begun.end()
        assert begun.left() == []
        assert list(begun.temporary.iterdir()) == []
        assert done.seconds < ALL_END_WITHIN
        return done

    return run


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_raises_ends_all_and_its_error_is_shown(
    fail: Callable[..., Ended], launcher: str
) -> None:
    """N6, N7: the other one is blocked and never notices."""
    done = fail(
        launcher,
        """
        def main(world):
            if world.rank == 1:
                raise ValueError("no such column: 'label'")
            blocked()
        """,
    )
    assert done.code == 1
    assert "rank 1 on" in done.err
    assert "ValueError: no such column: 'label'" in done.err
    assert 'train.py", line' in done.err
    assert "[DT302]" in done.err
    assert "result" not in done.out


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_0_may_be_the_one_that_raises(fail: Callable[..., Ended], launcher: str) -> None:
    """N6, N7"""
    done = fail(
        launcher,
        """
        def main(world):
            if world.rank == 0:
                raise ValueError("boom")
            blocked()
        """,
    )
    assert done.code == 1
    assert "ValueError: boom" in done.err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_ended_by_a_signal_is_reported_as_such(
    fail: Callable[..., Ended], launcher: str
) -> None:
    """N8: rank 0 sits in C code, where no Python exception can reach it."""
    done = fail(
        launcher,
        """
        def main(world):
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                ctypes.CDLL(None).pause()
        """,
        quick=launcher != "script",
    )
    assert done.code == 1
    assert "rank 1 on" in done.err
    assert "was ended by SIGKILL" in done.err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_first_failure_is_shown_not_the_collective_that_it_broke(
    fail: Callable[..., Ended], launcher: str
) -> None:
    """N7: rank 0 fails first by the clock, since rank 1 still runs its teardown."""
    done = fail(
        launcher,
        """
        def main(world):
            flag = os.path.join(os.environ["DRIVETRAIN_FAILURES"], "flag")
            if world.rank == 0:
                open(flag, "w").close()
                raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
            try:
                raise ValueError("the real reason")
            finally:
                while not os.path.exists(flag):
                    pass
                time.sleep(0.3)
        """,
        quick=False,
    )
    assert done.code == 1
    error = done.err[done.err.index("ProcessFailedError: A run of 2") :]
    assert "because rank 1 on" in error.splitlines()[0]
    assert "ValueError: the real reason" in error.splitlines()[0]
    assert "Then rank 0 on" in error


@pytest.mark.parametrize(
    ("launcher", "how", "what"),
    [
        ("script", "os._exit(0)", "ended with exit code 0 before it finished"),
        ("script", "sys.exit(5)", "raised SystemExit: 5"),
        ("spawn", "os._exit(3)", "ended with exit code 3 before it finished"),
        ("spawn", "os.abort()", "was ended by SIGABRT"),
        ("fork", "os._exit(0)", "ended with exit code 0 before it finished"),
        ("fork", "sys.exit(5)", "raised SystemExit: 5"),
    ],
)
def test_a_rank_that_just_ends_is_a_failure(
    fail: Callable[..., Ended], launcher: str, how: str, what: str
) -> None:
    """N8"""
    done = fail(
        launcher,
        f"""
        def main(world):
            if world.rank == 1:
                {how}
            blocked()
        """,
    )
    assert done.code == 1
    assert what in done.err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_ignores_sigterm_is_ended_too(
    fail: Callable[..., Ended], launcher: str
) -> None:
    """N6"""
    done = fail(
        launcher,
        """
        def main(world):
            if world.rank == 0:
                raise ValueError("boom")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            blocked()
        """,
        quick=launcher != "script",
    )
    assert done.code == 1
    assert "ValueError: boom" in done.err


@pytest.mark.parametrize("launcher", ["spawn", "fork"])
def test_what_a_failing_rank_started_ends_with_it(
    fail: Callable[..., Ended], launcher: str
) -> None:
    """N6: such as data loading workers of a rank that was killed."""
    done = fail(
        launcher,
        """
        def main(world):
            if world.rank == 1:
                subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
                os.kill(os.getpid(), signal.SIGKILL)
            blocked()
        """,
    )
    assert "SIGKILL" in done.err


def test_the_same_mistake_in_all_ranks_is_raised_as_itself_and_can_be_caught(
    fail: Callable[..., Ended],
) -> None:
    """N7: the script goes on in every rank, and the next launch finds them all.

    The ranks do not wait for each other before they fail, and the second may still be starting
    then. So the first gives it a minute, where users' ranks have met already.
    """
    done = fail(
        "script",
        """
        processes.GRACE = 60.0
        calls = []
        def main(world):
            calls.append(1)
            if len(calls) == 1:
                raise ValueError("boom")
            return world.rank
        """,
        """
        try:
            launch()
        except ValueError as error:
            say("caught", error)
        say("second", launch())
        """,
    )
    assert done.code == 0
    assert sorted(done.out.split("\n"))[1:] == ["caught boom"] * 2 + ["second 0", "second 1"]


def test_the_error_of_another_rank_can_be_caught_in_rank_0(fail: Callable[..., Ended]) -> None:
    """N6, N7: by then the others have ended, and no new launch can bring them back."""
    done = fail(
        "script",
        """
        def main(world):
            if world.rank == 1:
                raise ValueError("boom")
            signal.sigtimedwait([], 0.5)
        """,
        """
        for _ in range(2):
            try:
                launch()
            except DrivetrainError as error:
                say("caught", type(error).__name__, "boom" in str(error))
        """,
    )
    assert (done.code, done.out) == (0, "caught ProcessFailedError True\n" * 2)


@pytest.mark.parametrize(
    ("how", "code"), [("sys.exit(3)", 1), ("os._exit(3)", 1), ("raise ValueError", 1)]
)
def test_a_rank_that_fails_after_its_part_fails_the_script(
    fail: Callable[..., Ended], how: str, code: int
) -> None:
    """N9"""
    done = fail(
        "script",
        """
        def main(world):
            return world.rank
        """,
        f"""
        rank = launch()
        if rank == 1:
            {how}
        say("rank 0 is done")
        """,
    )
    assert done.code == code
    assert "rank 1 on" in done.err


def test_a_rank_waiting_for_a_launch_that_never_comes_is_ended(
    fail: Callable[..., Ended],
) -> None:
    """N9: rank 0 ends while the other has entered a second launch."""
    done = fail(
        "script",
        """
        calls = []
        def main(world):
            calls.append(1)
            if len(calls) == 2:
                blocked()
            return world.rank
        """,
        """
        if launch() == 1:
            launch()
        """,
    )
    assert done.code == 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_ranks_end_when_their_launcher_is_killed(
    start: Callable[..., Run], launcher: str
) -> None:
    """N10"""
    run = start(
        launcher,
        """
        def main(world):
            say("ready", world.rank, os.getpid())
            blocked()
        """,
    )
    run.lines(2)
    run.process.kill()
    run.process.wait(timeout=10)
    run.wait_until_alone()
    assert list(run.temporary.iterdir()) == []


def test_a_rank_in_c_code_that_ignores_sigterm_ends_with_its_launcher(
    start: Callable[..., Run],
) -> None:
    """N10"""
    run = start(
        "spawn",
        """
        def main(world):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("ready")
            while True:
                ctypes.CDLL(None).pause()
        """,
    )
    run.lines(2)
    run.process.kill()
    run.process.wait(timeout=10)
    run.wait_until_alone()


@pytest.mark.parametrize("launcher", ["spawn", "fork"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_stop_signal_is_passed_on_once_and_ends_the_run_cleanly(
    start: Callable[..., Run], launcher: str, number: signal.Signals, code: int
) -> None:
    """N11, N12"""
    run = start(
        launcher,
        """
        def main(world):
            stop_cleanly()
            try:
                say("ready")
                blocked()
            finally:
                signal.sigtimedwait([signal.SIGTERM, signal.SIGINT], 0.2)
                say("teardown", world.rank)
        """,
    )
    run.lines(2)
    run.process.send_signal(number)
    done = run.end()
    assert done.code == code
    assert sorted(done.out.split("\n"))[1:] == ["teardown 0", "teardown 1"]
    assert "ProcessFailed" not in done.err


@pytest.mark.parametrize("launcher", ["spawn", "fork"])
def test_a_stopped_run_may_still_return_a_result(start: Callable[..., Run], launcher: str) -> None:
    """N12"""
    run = start(
        launcher,
        """
        def main(world):
            stop_cleanly()
            try:
                say("ready")
                blocked()
            except SystemExit:
                return "stopped"
        """,
    )
    run.lines(2)
    run.process.terminate()
    done = run.end()
    assert (done.code, done.out) == (0, "result stopped\n")


@pytest.mark.parametrize("launcher", ["spawn", "fork"])
def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(
    start: Callable[..., Run], launcher: str
) -> None:
    """N11"""
    run = start(
        launcher,
        """
        def main(world):
            signal.signal(signal.SIGINT, lambda *_: say("heard"))
            say("ready")
            blocked()
        """,
    )
    run.lines(2)
    run.process.send_signal(signal.SIGINT)
    assert run.lines(2) == ["heard"] * 2
    run.process.send_signal(signal.SIGINT)
    done = run.end()
    assert done.code in {130, -signal.SIGINT}
    assert done.seconds < ALL_END_WITHIN


def test_ranks_that_stop_together_are_no_failure(start: Callable[..., Run]) -> None:
    """N12: as after the trainer's agreement on a stop; the last rank takes its time."""
    run = start(
        "script",
        """
        def main(world):
            stop_cleanly()
            try:
                say("ready", os.getpid())
                blocked()
            finally:
                signal.sigtimedwait([], 0.0 if world.rank else 0.5)
        """,
    )
    pids = [int(line.split()[1]) for line in run.lines(2)]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    done = run.end()
    assert (done.code, done.err) == (143, "")
    assert list(run.temporary.iterdir()) == []


def test_ctrl_c_in_a_terminal_reaches_every_rank_of_a_script(start: Callable[..., Run]) -> None:
    """N11, N12: the terminal signals the whole process group."""
    run = start(
        "script",
        """
        def main(world):
            say("ready")
            blocked()
        """,
    )
    run.lines(2)
    os.killpg(run.process.pid, signal.SIGINT)
    done = run.end()
    assert done.code == -signal.SIGINT
    assert "ProcessFailed" not in done.err


def test_one_rank_that_a_signal_ends_stops_the_run(fail: Callable[..., Ended]) -> None:
    """N12: whoever sent it meant the run."""
    done = fail(
        "spawn",
        """
        def main(world):
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            blocked()
        """,
    )
    assert done.code == 143
    assert "SIGTERM ended one of its processes" in done.err


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_lost_one_which_a_signal_had_ended_is_no_failure(
    fail: Callable[..., Ended], launcher: str, first: int
) -> None:
    """N12: whichever of the two is noticed first."""
    done = fail(
        launcher,
        f"""
        processes.GRACE = 60.0
        def main(world):
            flag = os.path.join(os.environ["DRIVETRAIN_FAILURES"], "flag")
            while world.rank != {first} and not os.path.exists(flag):
                time.sleep(0.01)
            open(flag, "w").close()
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
        """,
    )
    assert done.code == 143
    assert "ProcessFailedError" not in done.err


@pytest.mark.parametrize(
    ("error", "stop"),
    [
        (KeyboardInterrupt(), True),
        (SystemExit(), True),
        (SystemExit(0), True),
        (SystemExit(143), True),
        (SystemExit(130), True),
        (SystemExit(1), False),
        (SystemExit("no"), False),
        (ValueError(), False),
    ],
)
def test_a_stop_is_told_from_a_failure(error: BaseException, stop: bool) -> None:
    """N12"""
    assert is_stop(error) is stop


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (ConnectionResetError(), True),
        (ProcessFailedError("x"), True),
        (type("DistBackendError", (type("DistError", (RuntimeError,), {}),), {})("nccl"), True),
        (chained(ValueError("x"), BrokenPipeError()), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed by peer"), False),
    ],
)
def test_a_broken_collective_is_told_from_its_cause(error: Exception, consequence: bool) -> None:
    """N7"""
    assert is_consequence(error) is consequence


def failure(rank: int, weight: int, when: int, kind: str = "ValueError") -> Failure:
    return Failure(rank, "host", kind, f"m{rank}", "trace\n", weight, when)


def test_the_first_failure_goes_by_weight_and_then_by_time() -> None:
    """N7"""
    late, early = failure(1, CAUSE, 20), failure(2, CAUSE, 10)
    effect, killed = failure(0, CONSEQUENCE, 1), failure(3, KILLED, 99)
    assert first_of([]) is None
    assert first_of([effect, late]) is late
    assert first_of([effect, late, early]) is early
    assert first_of([effect, late, early, killed]) is killed


def test_the_error_names_rank_host_and_traceback_and_pickles() -> None:
    """N7"""
    error = process_failed([failure(0, CONSEQUENCE, 1), failure(3, CAUSE, 5)], 4)
    text = str(pickle.loads(pickle.dumps(error)))
    assert "rank 3 on 'host' raised ValueError: m3." in text
    assert "Traceback of rank 3:\ntrace" in text
    assert "Then rank 0 on 'host' raised ValueError: m0" in text


def test_a_rank_writes_down_when_it_enters_and_how_it_leaves(tmp_path: Path) -> None:
    """N7"""
    directory = RunDirectory(str(tmp_path))
    world = World(rank=0, size=1)
    states: list[RankState] = []

    def main(world: World) -> int:
        states.append(directory.read(0))
        if len(states) == 2:
            raise ValueError("boom")
        if len(states) == 3:
            raise SystemExit(143)
        return 5

    assert directory.read(0) == RankState()
    assert reported(main, world, directory) == 5
    assert (states[0], directory.read(0)) == (RankState(1, 0), RankState(1, 1))
    with pytest.raises(ValueError, match="boom"):
        reported(main, world, directory)
    state = directory.read(0)
    assert (state.entered, state.left, state.stopped) == (2, 2, False)
    assert state.failure is not None
    assert (state.failure.kind, state.failure.weight) == ("ValueError", CAUSE)
    assert "in main" in state.failure.trace
    assert "in reported" not in state.failure.trace
    with pytest.raises(SystemExit):
        reported(main, world, directory)
    assert directory.read(0) == RankState(3, 3, stopped=True)
    directory.remove()
    directory.remove()
    assert not tmp_path.exists()
