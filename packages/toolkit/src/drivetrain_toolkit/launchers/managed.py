"""Launchers that have a manager of processes start the ranks: mpirun, and srun or sbatch of SLURM.

The manager decides where ranks run; each learns its place from the manager's own variables, as in
a program that the user had started that way. What is to be called, what went wrong and what came
out go through files in a folder that all machines see.
"""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import NotFoundError, ProcessFailedError
from drivetrain_interfaces.launcher import LaunchPlan

from drivetrain_toolkit.failures import RunDirectory, process_failed
from drivetrain_toolkit.launchers.fresh import TASK, WORKER, Pump
from drivetrain_toolkit.launchers.pickles import pickled_by_value, unpickled
from drivetrain_toolkit.launchers.sending import SendingLauncher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.launcher import LaunchRequest

#: What rank 0 writes its result to.
RESULT: Final = "result.pickle"
_SPECIAL_STEPS: Final = 0xFFFF_FF00


class ManagedLauncher(SendingLauncher):
    """What launchers share that hand their ranks to a program which starts and watches them.

    Args:
        options: Further options of the program, such as ``("--oversubscribe",)``.
        folder: A folder that every machine sees, for what goes in and comes out. None takes the
            working directory for several machines, and the place for temporary files for one.
    """

    program = ""
    #: What each process is sent when this one is told to stop, by the signal that said so.
    passed_on: tuple[tuple[int, int], ...] = (
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGTERM),
    )

    def __init__(self, options: Sequence[str] = (), folder: str | None = None) -> None:
        self.options = tuple(options)
        self.folder = folder
        self._size = 1
        self._several_machines = False

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The command. It lists no worlds: the manager decides who runs where.

        Raises:
            ClusterError: The request cannot be met, or this process is a rank already.
            NotFoundError: The manager's program, or cloudpickle, is not installed.
        """
        self._check(request)
        if shutil.which(self.program) is None:
            raise NotFoundError(
                f"The {self.name!r} launcher was asked for, and there is no program "
                f"{self.program!r} on the PATH.",
                "Install it or load its module, or choose another launcher.",
            )
        self._size = request.local_size * request.num_nodes
        self._several_machines = request.num_nodes > 1
        worker = (sys.executable, "-m", WORKER, f"--managed={self.name}")
        return LaunchPlan(self.name, (), (*self._command(request), *worker))

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Have ``main`` run in every process, wait, and return what rank 0 returned, by pickle.

        Raises:
            ProcessFailedError: A rank failed, or the manager did.
            UserCodeError: ``main`` or its result cannot be pickled.
            KeyboardInterrupt: The run was stopped by SIGINT.
            SystemExit: The run was stopped by SIGTERM (exit code 143).
        """
        task = pickled_by_value(main, self.name)
        directory = RunDirectory(self._new_folder())
        try:
            content = {"path": list(sys.path), "task": task, "size": self._size}
            Path(directory.path, TASK).write_bytes(pickle.dumps(content))
            code, stopped = self._run((*plan.command, directory.path))
            return self._outcome(directory, code, stopped)
        finally:
            directory.remove()

    def _command(self, request: LaunchRequest) -> tuple[str, ...]:
        raise NotImplementedError

    def _new_folder(self) -> str:
        where = self.folder or (os.getcwd() if self._several_machines else None)
        return tempfile.mkdtemp(prefix="drivetrain-run-", dir=where)

    def _run(self, command: Sequence[str]) -> tuple[int, int]:
        """Run the manager's program; its exit code, and the signal that this process got, or 0."""
        process = subprocess.Popen(  # noqa: S603 - the manager's program with this interpreter
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        pumps = (Pump(process.stdout, sys.stdout), Pump(process.stderr, sys.stderr))
        seen: list[int] = []
        with _passing_on(process, dict(self.passed_on), seen):
            code = process.wait()
        for pump in pumps:
            pump.finish()
        return code, seen[0] if seen else 0

    def _outcome(self, directory: RunDirectory, code: int, stopped: int) -> Any:
        states = [directory.read(rank) for rank in range(self._size)]
        failures = [state.failure for state in states if state.failure]
        if failures:
            raise process_failed(failures, self._size)
        result = Path(directory.path, RESULT)
        if result.exists():
            return unpickled(result.read_bytes(), "The result of rank 0")
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped or any(state.stopped for state in states):
            raise SystemExit(128 + (stopped or signal.SIGTERM))
        raise ProcessFailedError(
            f"The {self.name!r} launcher ran {self.program} for {self._size} processes; it ended "
            f"with exit code {code}, and no rank said why.",
            f"Look at what {self.program} printed.",
        )


class MPILauncher(ManagedLauncher):
    """Has ``mpirun`` start the ranks, of Open MPI, MPICH or Intel MPI.

    On several machines as many ranks are placed on each host of the job or of the options. Where
    no scheduler tells the hosts, ``MASTER_ADDR`` and ``MASTER_PORT`` must be set.
    """

    name = "mpi"
    program = "mpirun"

    def _command(self, request: LaunchRequest) -> tuple[str, ...]:
        size = str(request.local_size * request.num_nodes)
        place: tuple[str, ...] = ()
        if request.num_nodes > 1:
            per_node = str(request.local_size)
            place = (
                ("--map-by", f"ppr:{per_node}:node") if self._is_open_mpi() else ("-ppn", per_node)
            )
        return (self.program, "-n", size, *place, *self.options)

    def _is_open_mpi(self) -> bool:
        done = subprocess.run(  # noqa: S603 - the program that is about to be run
            (self.program, "--version"), capture_output=True, text=True, check=False, timeout=30
        )
        return any(name in done.stdout for name in ("Open MPI", "OpenRTE", "PRTE"))


class SlurmLauncher(ManagedLauncher):
    """Submits itself to SLURM: ``srun`` in a job or from the login node, or ``sbatch --wait``.

    Args:
        options: Options of ``srun``, such as ``("--partition=gpu", "--gpus-per-node=4")``; with
            ``batch`` those of ``sbatch``.
        folder: A folder that every machine sees; None takes the working directory.
        batch: Queue a batch job and wait for it, rather than hold a terminal's ``srun``.
    """

    name = "slurm"
    program = "srun"

    def __init__(
        self, options: Sequence[str] = (), folder: str | None = None, *, batch: bool = False
    ) -> None:
        super().__init__(options, folder)
        self.batch = batch
        if batch:
            self.program = "sbatch"

    def _command(self, request: LaunchRequest) -> tuple[str, ...]:
        shape = (
            f"--nodes={request.num_nodes}",
            f"--ntasks={request.num_nodes * request.local_size}",
            f"--ntasks-per-node={request.local_size}",
        )
        run: tuple[str, ...] = ("srun", *shape, "--kill-on-bad-exit=1")
        if self.batch:
            return ("sbatch", "--wait", "--quiet", *shape, *self.options, "--wrap", *run)
        step = os.environ.get("SLURM_STEP_ID", "")
        if step.isdigit() and int(step) < _SPECIAL_STEPS:
            run = (*run, "--overlap")  # else it would wait for the resources that this step holds
        return (*run, *self.options)

    def _new_folder(self) -> str:
        return tempfile.mkdtemp(prefix="drivetrain-run-", dir=self.folder or os.getcwd())

    def _run(self, command: Sequence[str]) -> tuple[int, int]:
        if not self.batch:
            return super()._run(command)
        wrapped = command.index("--wrap") + 1
        log = Path(command[-1], "output.txt")
        code, stopped = super()._run(
            (
                *command[: wrapped - 1],
                f"--output={log}",
                "--wrap",
                f"exec {shlex.join(command[wrapped:])}",
            )
        )
        if log.exists():
            sys.stdout.write(log.read_text(encoding="utf-8", errors="replace"))
        return code, stopped


@contextmanager
def _passing_on(
    process: subprocess.Popen[bytes], meanings: dict[int, int], seen: list[int]
) -> Iterator[None]:
    """Send signals that come here on to the manager; a second one kills it and what it started.

    In a thread other than the main one Python allows no handlers; then signals do what they did.
    """

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)
        again = len(seen) > 1
        os.killpg(process.pid, signal.SIGKILL if again else meanings[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in meanings}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
