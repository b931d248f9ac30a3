"""Questions to a fresh interpreter, of what must be neither imported nor opened in this one."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def count_elsewhere(question: str, env: Mapping[str, str], timeout_s: float) -> int | str:
    """How many devices another process finds, or why it found out nothing.

    The same question is asked once in a process: it takes seconds, and the answer stays the same.

    Args:
        question: Python code that prints a line ``devices NUMBER``, or ``fault REASON``.
        env: The environment that it runs in.
        timeout_s: Seconds that it may take.
    """
    return _count(question, tuple(sorted(env.items())), timeout_s)


@lru_cache(maxsize=8)
def _count(question: str, env: tuple[tuple[str, str], ...], timeout_s: float) -> int | str:
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and a backend's own text
            [sys.executable, "-c", question],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=dict(env),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {timeout_s:.0f} seconds"
    except OSError as error:
        return f"it could not be started: {error}"
    for line in done.stdout.splitlines():
        if line.startswith("devices "):
            return int(line.removeprefix("devices "))
        if line.startswith("fault "):
            return line.removeprefix("fault ")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return f"it ended with code {done.returncode}: {last}"
