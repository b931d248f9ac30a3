"""Reads hostile files in a process that watches itself; run by ``test_checkpoint_hostile.py``.

Usage: hostile_reader.py CORPUS OUTPUT. Prints a JSON object: for each file of the corpus, what each
reader did with it; and what was seen that no reader may do.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from drivetrain_interfaces.errors import DrivetrainError

from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

# Code that a file brings would have to do one of these.
FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "marshal.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.",
    "socket.",
    "ctypes.dlopen",
    "ctypes.dlsym",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "shutil.",
)
seen = []
state = {"watching": False, "output": ""}


def watch(event, arguments):
    if not state["watching"]:
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            inside = os.path.abspath(str(path)).startswith(state["output"])
            if not inside:
                seen.append(f"{event} {path} {mode}")
    elif event.startswith(FORBIDDEN) and event != "socket.gethostname":
        text = " ".join(map(str, arguments))
        if state["output"] not in text:
            seen.append(f"{event} {text[:200]}")


def outcome(function):
    try:
        result = function()
    except DrivetrainError as error:
        return f"[{error.code}] {type(error).__name__}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        return f"UNNAMED {type(error).__name__}: {error}"[:300]
    return f"returned {type(result).__name__} {result!r}"[:300]


def read_lazily(io, path):
    for value in io.open(path).values():
        if hasattr(value, "read"):
            value.read()


def most():
    """The most bytes that this process has had in memory; what rusage says is also its parent's."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    except FileNotFoundError:
        return 0


def peak(io, path):
    """The most that Python's objects take while a file is read."""
    read = io.load if os.path.isdir(path) else io.read_file
    tracemalloc.start()
    try:
        outcome(lambda: read(path))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def readers(io, path, output):
    yield "load", lambda: io.load(path)
    yield "open", lambda: read_lazily(io, path)
    yield "inspect", lambda: io.inspect(path)
    yield "verify", lambda: io.verify(path)
    yield "exists", lambda: io.exists(path)
    yield "read_file", lambda: io.read_file(path)
    yield "convert", lambda: io.convert(path, output, "directory")


def warm_up(io, output):
    """Import and cache whatever honest files need."""
    codecs.lookup("cp437")  # what zipfile decodes some names with
    codecs.lookup("raw-unicode-escape")  # and pickletools some texts
    tree = {"module": {"w": torch.ones(2)}, "a": np.ones(2), "f": float("nan")}
    good = os.path.join(output, "good")
    io.save(tree, good)
    torch.save({"w": torch.ones(2)}, f"{good}.pt")
    for path in (good, f"{good}.pt"):
        for _, function in readers(io, path, f"{path}.new"):
            outcome(function)
    io.convert(good, f"{good}.st", "safetensors")
    io.read_file(f"{good}.st")


def main():
    corpus, output = Path(sys.argv[1]), sys.argv[2]
    io = DirectoryCheckpointIO()
    warm_up(io, output)
    sys.addaudithook(watch)
    state.update(watching=True, output=output)
    base = most()
    found = {}
    for number, path in enumerate(sorted(corpus.iterdir())):
        target = os.path.join(output, str(number))
        found[path.name] = {
            name: outcome(function) for name, function in readers(io, str(path), target)
        }
    state["watching"] = False
    grown = most() - base
    # Programs take too long when every object is traced: what the process has grown is for them.
    peaks = {
        path.name: peak(io, str(path))
        for path in corpus.glob("expand-*")
        if not path.name.startswith("expand-program")
    }
    report = {"outcomes": found, "seen": seen, "grown": grown, "peaks": peaks}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
