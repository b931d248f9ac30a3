"""Real processes for the tests of this folder: started in a session of their own, never left."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = Path(__file__).parent / "scripts"
#: How long any process of a test may take, in seconds. Generous: a loaded machine is no failure.
PATIENCE = 100.0
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
_LEFT_OUT = (*_PLACE, "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

# The parts that training scripts share; tests use them too.
sys.path.insert(0, str(SCRIPTS))


def _clean(environment: dict[str, str]) -> dict[str, str]:
    """Without what an earlier run, or whoever started the tests, may have left."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith("DRIVETRAIN") and name not in _LEFT_OUT
    }


class Running:
    """A script that runs in a session of its own.

    Attributes:
        folder: Where it runs.
        lines: What it has printed to standard output so far.
    """

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self._errors = folder / f"stderr-{time.monotonic_ns()}.txt"
        self._queue: queue.Queue[str | None] = queue.Queue()
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**_clean(dict(os.environ)), "PYTHONUNBUFFERED": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    @property
    def output(self) -> str:
        """Everything that was printed, standard error last."""
        return "\n".join(self.lines) + "\n" + self.errors

    @property
    def errors(self) -> str:
        """What was printed to standard error."""
        return self._errors.read_text()

    def wait_for(self, beginning: str, count: int = 1) -> list[list[str]]:
        """The words of the first so many lines that begin with a word; waits for them."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = [line.split() for line in self.lines if line.startswith(f"{beginning} ")]
            if len(found) >= count:
                return found[:count]
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"no {count} lines {beginning!r}:\n{self.output}"
            self.lines.append(line)

    def signal_all(self, number: int) -> None:
        """Send a signal to its process group: what Ctrl-C in a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self, within: float = PATIENCE) -> int:
        """Its exit code. Fails, and ends it, if it takes longer."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.sweep()
            self._drain()
            pytest.fail(f"still running after {within:.0f} s:\n{self.output}")
        self._drain()
        return code

    def _drain(self) -> None:
        """Take the lines that are left; a grandchild that lives on may hold the pipe open."""
        self._reader.join(5.0)
        while not self._queue.empty():
            line = self._queue.get()
            if line is not None:
                self.lines.append(line)

    def left_behind(self, within: float = 5.0) -> list[int]:
        """Processes of its session that still run after so many seconds."""
        deadline = time.monotonic() + within
        while True:
            found = _session(self.process.pid)
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def sweep(self) -> None:
        """Kill whatever is left of its session."""
        for pid in _session(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5.0)


def _session(leader: int) -> list[int]:
    """Ids of the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, session = fields[0], int(fields[3])
        if session == leader and state not in "ZX":
            found.append(int(folder.name))
    return found


class Starter:
    """Starts ``python script arguments`` in a folder; ends what is left afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Running] = []

    def __call__(
        self,
        script: str,
        *arguments: str,
        by: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> Running:
        """Start a script of ``scripts``; ``by`` goes between the interpreter and the script."""
        return self._start([*by, str(SCRIPTS / script), *arguments], env or {})

    def command(self, *words: str) -> Running:
        """Start ``drivetrain`` with these words, where it can import what scripts share."""
        return self._start(["-m", "drivetrain", *words], {"PYTHONPATH": str(SCRIPTS)})

    def _start(self, words: list[str], env: dict[str, str]) -> Running:
        self._started.append(Running([sys.executable, *words], self.folder, env))
        return self._started[-1]

    def run(self, script: str, *arguments: str, **options: Any) -> Running:
        """Run a script to its end, which must be a good one."""
        running = self(script, *arguments, **options)
        assert running.finish() == 0, running.output
        return running

    def sweep(self) -> None:
        """Kill what is left."""
        for each in self._started:
            each.sweep()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts scripts in the folder of the test."""
    starter = Starter(tmp_path)
    yield starter
    starter.sweep()


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts scripts whose outcome several tests look at."""
    starter = Starter(tmp_path_factory.mktemp("module"))
    yield starter
    starter.sweep()


@pytest.fixture(scope="session", autouse=True)
def _all_imported() -> None:
    """Torch imports its compiler with the first optimizer; forked ranks then need not."""
    import torch

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """Fits in the tests' own process leave no seed, place or thread count for the next test."""
    import torch

    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ.clear()
    os.environ.update(_clean(before))
    torch.manual_seed(0)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Any]:
    """``worlds(size)``: processes on CPUs that answer cases, started when they are first needed."""
    from drivetrain_conformance.support.crew import Crew

    made: dict[int, Crew] = {}

    def of(size: int) -> Crew:
        if size not in made or made[size].broken:
            made[size] = Crew("cpu", None, tuple(range(size)))
        return made[size]

    yield of
    for crew in made.values():
        crew.stop()
