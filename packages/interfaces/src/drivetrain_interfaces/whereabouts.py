"""Where a rank is, or was when an error came: what reports about failing runs are made of.

The trainer knows steps, launchers know processes; both say the same with these.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PLACE = "__drivetrain_place__"

_BROKEN_COLLECTIVE = (
    "gloo/transport",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "nccl error",
)
# Function names of torch's public collectives; what is inside of them is of no interest.
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_BACKWARD = "_engine_run_backward"


def mark(error: BaseException, place: str) -> None:
    """Note on an error where in the run it came, such as ``"epoch 1, step 7"``. The first wins."""
    if not place_of(error):
        error.__dict__[_PLACE] = place


def place_of(error: BaseException) -> str:
    """What ``mark`` noted; empty if nothing."""
    return str(getattr(error, _PLACE, ""))


def is_consequence(error: BaseException) -> bool:
    """Whether this, or what caused it, says that another rank is gone rather than what is wrong."""
    seen: BaseException | None = error
    while seen is not None:
        classes = {each.__name__ for each in type(seen).__mro__}  # by name: torch is not imported
        text = str(seen).lower()
        if classes & {"ProcessFailedError", "ConnectionError", "DistError"}:
            return True
        if isinstance(seen, RuntimeError) and any(part in text for part in _BROKEN_COLLECTIVE):
            return True
        seen = seen.__cause__
    return False


def waits_in(frames: Iterable[traceback.FrameSummary]) -> str:
    """The collective that a stack is in, or empty. Outermost frame first, as Python prints it."""
    found = ""
    for frame in frames:
        file = frame.filename.replace("\\", "/")
        if file.endswith(_COLLECTIVES) and not frame.name.startswith("_"):
            found = found or frame.name
        elif frame.name == _BACKWARD:
            found = "backward, where gradients are averaged"
    return found


def waited_in(error: BaseException) -> str:
    """The collective that an error came out of, or empty."""
    seen: BaseException | None = error
    while seen is not None:
        found = waits_in(traceback.extract_tb(seen.__traceback__))
        if found:
            return found
        seen = seen.__cause__
    return ""
