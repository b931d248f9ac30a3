"""Running ``main`` in a process that is a rank already."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import ProcessFailedError

from drivetrain_toolkit.environments import LAUNCHED
from drivetrain_toolkit.failures import DIRECTORY, RunDirectory, is_stop, reported
from drivetrain_toolkit.processes import PARENT, follow

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from drivetrain_interfaces.cluster import World

SCRIPT: Final = "script"

_REPORTED: Final = "__drivetrain_reported__"
_following: set[int] = set()


def run_as_rank(main: Callable[[World], Any], world: World) -> Any:
    """Call ``main`` here; as a rank that the script launcher started, report how it went."""
    if os.environ.get(LAUNCHED) != SCRIPT or DIRECTORY not in os.environ:
        return main(world)
    directory = RunDirectory(os.environ[DIRECTORY])
    follow_launcher(int(os.environ[PARENT]), directory)
    try:
        return reported(main, world, directory)
    except BaseException as error:
        if not is_stop(error):
            _shown_by_the_launcher(error)
        raise


def follow_launcher(parent: int, directory: RunDirectory) -> None:
    """End with the process that started this one; once per process, however often it is called.

    Raises:
        ProcessFailedError: It has ended already.
    """
    if os.getpid() in _following:  # by process, since a fork inherits the set but no thread
        return
    try:
        follow(parent, directory)
    except ProcessLookupError as error:
        raise ProcessFailedError(
            f"Process {parent}, which started this rank, has ended.", "Start the run again."
        ) from error
    _following.add(os.getpid())


def _shown_by_the_launcher(error: BaseException) -> None:
    """Keep the interpreter from printing a traceback that rank 0 is about to show."""
    setattr(error, _REPORTED, True)
    if sys.excepthook is not _brief_hook:
        _brief.previous = sys.excepthook
        sys.excepthook = _brief_hook


class _Brief:
    previous: Any = sys.__excepthook__


_brief = _Brief()


def _brief_hook(
    kind: type[BaseException], value: BaseException, trace: TracebackType | None
) -> None:
    if getattr(value, _REPORTED, False):
        rank = os.environ.get("RANK", "?")
        sys.stderr.write(f"rank {rank} ends after {kind.__name__}; the launcher reports it\n")
    else:
        _brief.previous(kind, value, trace)
