"""Questions that need a fresh interpreter: what does an import, or a probe, change?

Run as a script, with what to do as JSON in its argument; prints an answer as JSON. It imports
nothing but the standard library before it looks.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_HARMLESS_DEVICES = (
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/pts",
)


def snapshot() -> dict[str, Any]:
    """What must not change."""
    return {
        "environment": dict(os.environ),
        "signals": {
            int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()
        },
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.disabled],
        "threads": threading.active_count(),
        "directory": os.getcwd(),
        "children": children(),
        "devices": open_devices(),
    }


def children() -> list[int]:
    """Processes that this one started and that still run, where the system tells."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return [int(pid) for pid in path.read_text("ascii").split()] if path.exists() else []


def open_devices() -> list[str]:
    """Device files that this process holds open, where the system tells."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        return []
    found = []
    for entry in folder.iterdir():
        try:
            place = os.readlink(entry)
        except OSError:  # the one that lists the folder
            continue
        if place.startswith("/dev/") and not place.startswith(_HARMLESS_DEVICES):
            found.append(place)
    return sorted(found)


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What differs between two snapshots."""
    return {
        key: {"before": value, "after": after[key]}
        for key, value in before.items()
        if after[key] != value
    }


def resolve(reference: str) -> Any:
    """The object behind ``module:object``."""
    module, _, path = reference.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Import a spec, and probe if that is asked."""
    sys.path[:] = question["path"]
    importlib.import_module("drivetrain_interfaces.backend")  # which every spec needs
    loaded = set(sys.modules)
    before = snapshot()
    spec = resolve(question["reference"])
    told: dict[str, Any] = {
        "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}),
        "standard": sorted(sys.stdlib_module_names),
        "changed": changed(before, snapshot()),
    }
    if question["probe"]:
        before = snapshot()
        try:
            probes = [spec.probe() for _ in range(3)]
        except BaseException as error:  # noqa: BLE001 - whatever it is, the rule is broken
            told["raised"] = f"{type(error).__name__}: {error}"
            return told
        started = time.perf_counter()
        spec.probe()
        told["seconds"] = time.perf_counter() - started
        told["probes"] = [repr(probe) for probe in probes]
        told["changed_by_probe"] = changed(before, snapshot())
        told["initialized"] = initialized(spec.facts.device_type)
    return told


def initialized(device_type: str) -> bool:
    """Whether torch, if it was loaded at all, says that it has opened a device of this type."""
    module = getattr(sys.modules.get("torch"), device_type, None)
    asked = getattr(module, "is_initialized", None)
    return bool(asked()) if asked is not None else False


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))  # noqa: T201 - it is the answer
