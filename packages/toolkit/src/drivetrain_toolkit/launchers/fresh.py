"""The notebook launcher: the function goes to fresh processes, and their output comes back."""

from __future__ import annotations

import codecs
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from drivetrain_toolkit.launchers.forking import ChildrenLauncher, Family
from drivetrain_toolkit.launchers.pickles import need_cloudpickle, pickled_by_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.launcher import LaunchPlan

    from drivetrain_toolkit.launchers.forking import ChildPlace
    from drivetrain_toolkit.processes import Process

#: The module that runs in a fresh process, and the file in the run directory that it reads.
WORKER: Final = "drivetrain_toolkit.launchers.worker"
TASK: Final = "task.pickle"
#: How long output is waited for once its process has ended: what that started may hold the pipe.
_LAST_OUTPUT: Final = 2.0


class NotebookLauncher(ChildrenLauncher):
    """Starts fresh processes from a notebook or a prompt, with what was defined there.

    Functions and classes of the notebook travel by value, so no module has to be written. Unlike
    with ``fork`` the notebook may have used a device already, and may hold threads. What ranks
    print appears where this process prints: in the cell. Lines of other ranks than 0 say whose
    they are.
    """

    name = "notebook"

    @property
    def interactive(self) -> bool:
        """True: it is made for that. It works in scripts too."""
        return True

    def _check_possible(self) -> None:
        need_cloudpickle(self.name)

    def _task(self, main: Callable[[World], Any]) -> bytes:
        return pickled_by_value(main, self.name)

    def _family(self, plan: LaunchPlan, task: Callable[[World], Any] | bytes) -> Family:
        return _FreshFamily(self.name, plan, task)


class _FreshFamily(Family):
    """Ranks that are fresh interpreters, with their output in hand."""

    def run(self) -> Any:
        self._pumps: list[Pump] = []
        self._lines = Lines()
        assert isinstance(self._task, bytes), "the launcher has pickled it"
        write_task(self._directory.path, self._task)
        try:
            return super().run()
        finally:
            for pump in self._pumps:
                pump.finish()

    def _begin(
        self, place: ChildPlace, sending: Connection | None, before: Mapping[int, Any]
    ) -> Process:
        handles = () if sending is None else (sending.fileno(),)
        process = subprocess.Popen(  # noqa: S603 - this interpreter and a module of ours
            [sys.executable, "-m", WORKER, self._directory.path, *map(str, handles)],
            env={**os.environ, **place.variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=handles,
        )
        rank = place.world.rank
        prefix = f"[rank {rank}] " if rank else ""
        assert process.stdout is not None, "it was asked for"
        assert process.stderr is not None, "it was asked for"
        self._pumps.append(Pump(process.stdout, sys.stdout, prefix, self._lines))
        self._pumps.append(Pump(process.stderr, sys.stderr, prefix, self._lines))
        return process


def write_task(folder: str, task: bytes) -> None:
    """Put into a folder what a fresh process needs: where to import from, and what to call."""
    data = pickle.dumps({"path": list(sys.path), "task": task})
    Path(folder, TASK).write_bytes(data)


class Lines:
    """What the pumps of one run share, so that no line of a rank begins inside another's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: Pump | None = None

    def write(self, pump: Pump, text: str, target: TextIO) -> None:
        """Write some text of a pump, on a line of its own if another's line is not ended."""
        with self._lock:
            if self._open not in (None, pump):
                text = f"\n{text}"
            self._open = None if text.endswith(("\n", "\r")) else pump
            target.write(text)
            target.flush()


class Pump:
    """Copies what a process writes to a text stream of this one, from a thread.

    Args:
        source: The reading end of the process's pipe, in bytes; closed at its end.
        target: Where the text goes.
        prefix: What each line begins with; without one the text is passed on as it comes, so that
            progress bars move.
        lines: Shared by the pumps whose text meets in one place.
    """

    def __init__(
        self, source: Any, target: TextIO, prefix: str = "", lines: Lines | None = None
    ) -> None:
        self._lines = lines or Lines()
        self._source = source
        self._target = target
        self._prefix = prefix
        self._thread = threading.Thread(target=self._run, name="drivetrain-output", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last output of a process that has ended."""
        self._thread.join(_LAST_OUTPUT)

    def _run(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        rest = ""
        with self._source:
            while data := os.read(self._source.fileno(), 65536):
                text = decoder.decode(data)
                if self._prefix:
                    *lines, rest = (rest + text).split("\n")
                    text = "".join(f"{self._prefix}{line}\n" for line in lines)
                self._write(text)
        if rest:
            self._write(f"{self._prefix}{rest}\n")

    def _write(self, text: str) -> None:
        if text:
            self._lines.write(self, text, self._target)
