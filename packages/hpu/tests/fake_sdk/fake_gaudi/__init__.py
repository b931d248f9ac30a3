"""What the fake Gaudi software is like: cards, faults, and who holds which module.

Options are in the variable ``DRIVETRAIN_FAKE_GAUDI``, a JSON object, which children inherit:

    cards       how many modules the machine has
    generation  what get_device_name() says
    locks       the folder with a lock file for each module
    fault       what the import of the bridge raises: "assertion", "attribute", "os"
    lazy        the mode where PT_HPU_LAZY_MODE is not set, which changed between releases
    limit       bytes of each module
    shared      several processes may open one module, for the kit, which keeps crews of its own
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

VARIABLE = "DRIVETRAIN_FAKE_GAUDI"


def option(name: str, default: Any) -> Any:
    return json.loads(os.environ.get(VARIABLE) or "{}").get(name, default)


def cards() -> int:
    return int(option("cards", 2))


def visible() -> list[str]:
    named = os.environ.get("HABANA_VISIBLE_MODULES", "")
    there = [str(index) for index in range(cards())]
    return [each for each in named.split(",") if each in there] if named else there


def locks() -> Path:
    usual = Path(tempfile.gettempdir(), f"drivetrain-fake-gaudi-{os.getpgrp()}")
    folder = Path(option("locks", usual))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Held:
    """The module that this process holds: at most one, to its end."""

    module: str | None = None
    file: Any = None
    #: Why it was opened, for tests that want nobody to.
    calls: list[str] = []  # noqa: RUF012 - one per process


def acquire(caller: str) -> None:
    """Open a module on first use: the one that HLS_MODULE_ID names, or a free one."""
    if Held.module is not None:
        return
    Held.calls.append(caller)
    wanted = os.environ.get("HLS_MODULE_ID")
    # Which one the driver gives is not specified; the last, so that nobody relies on the first.
    for module in [wanted] if wanted is not None else reversed(visible()):
        file = try_lock(str(module))
        if file is not None:
            Held.module, Held.file = str(module), file
            return
    raise RuntimeError("synStatus=26 [Generic failure] Device acquire failed.")


def try_lock(module: str) -> Any:
    if module not in [str(index) for index in range(cards())]:
        return None
    file = Path(locks(), f"module-{module}").open("w", encoding="utf-8")  # noqa: SIM115 - kept open
    try:
        kind = fcntl.LOCK_SH if option("shared", False) else fcntl.LOCK_EX
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_held(module: str) -> bool:
    """Whether any process holds a module."""
    if Held.module == module:
        return True
    file = try_lock(module)
    if file is None:
        return True
    file.close()
    return False
