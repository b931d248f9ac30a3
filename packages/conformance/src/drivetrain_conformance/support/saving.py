"""Saves that are killed or run out of room at every point, in processes of their own.

Run as a script, with a question as JSON in its argument. It imports the backend once and forks for
each fault, because importing takes longer than all of them. Prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import CheckpointIO

#: Python's audit events that come just before something on the disk changes.
_EVENTS = ("open", "os.", "shutil.", "ctypes.call", "mmap.")
_MOST_FAULTS = 200

#: Exit codes of a child: what its save came to.
SAVED, STORAGE_ERROR, OTHER_ERROR = 0, 10, 11


def tree(number: int) -> dict[str, Any]:
    """A small tree that says which save it is from."""
    import torch

    return {"number": number, "tensor": torch.full((64,), float(number)), "text": "x" * number}


def in_child(fault: Callable[[], None], save: Callable[[], None]) -> int:
    """Save in a forked process in which a fault was prepared. Its exit code, or minus a signal."""
    from drivetrain_interfaces import StorageError

    pid = os.fork()
    if pid == 0:
        code = OTHER_ERROR
        try:
            fault()
            save()
            code = SAVED
        except StorageError:
            code = STORAGE_ERROR
        except BaseException:  # noqa: BLE001 - the code says so, and the traceback is shown
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def kill_at(number: int) -> Callable[[], None]:
    """A fault: SIGKILL just before the disk is touched for the ``number``-th time."""

    def prepare() -> None:
        seen = 0

        def hook(event: str, _: Any) -> None:
            nonlocal seen
            if event.startswith(_EVENTS) and event != "os.kill":  # which is our own
                seen += 1
                if seen >= number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def no_room_after(size: int) -> Callable[[], None]:
    """A fault: no file may become larger than this."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def what_is_there(io: CheckpointIO, path: str) -> str:
    """The number of the save that is found, ``nothing``, or what is wrong."""
    try:
        if not io.exists(path):
            return "nothing"
        found = io.load(path)
        wanted = tree(found["number"])
        whole = found["tensor"].equal(wanted["tensor"]) and found["text"] == wanted["text"]
        return str(found["number"]) if whole else f"a mixture: {found}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"


def kill_everywhere(io: CheckpointIO, folder: str, *, replacing: bool) -> dict[str, Any]:
    """Kill a save at each of its steps; what is there after each, and after a save that follows."""
    path = os.path.join(folder, "replaced" if replacing else "new", "c.ckpt")
    found: list[str] = []
    for number in range(1, _MOST_FAULTS):
        if replacing:
            io.save(tree(1), path)
        else:
            io.remove(path)
        code = in_child(kill_at(number), lambda: io.save(tree(2), path))
        if code == SAVED:
            break
        found.append(what_is_there(io, path) if code == -signal.SIGKILL else f"exit code {code}")
    io.save(tree(3), path)
    return {
        "found": found,
        "finally": what_is_there(io, path),
        "left": sorted(os.listdir(os.path.dirname(path))),
    }


def run_out_of_room(io: CheckpointIO, folder: str) -> list[dict[str, Any]]:
    """Save with ever more room; what each came to, what is there, and what is left behind."""
    path = os.path.join(folder, "full", "c.ckpt")
    told: list[dict[str, Any]] = []
    for size in (0, 1, 64, 300, 600, 1000, 1500):
        io.save(tree(1), path)
        code = in_child(no_room_after(size), lambda: io.save(tree(2), path))
        left = sorted(os.listdir(os.path.dirname(path)))
        told.append({"room": size, "code": code, "found": what_is_there(io, path), "left": left})
    return told


def main(question: dict[str, Any]) -> dict[str, Any]:
    """Every fault there is."""
    sys.path[:] = question["path"]
    from drivetrain_conformance.target import find_target

    io = find_target(question["backend"]).spec.load().checkpoint_io()
    folder = question["folder"]
    return {
        "new": kill_everywhere(io, folder, replacing=False),
        "replaced": kill_everywhere(io, folder, replacing=True),
        "full": run_out_of_room(io, folder),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201 - it is the answer
