"""A save that goes on while training does, in a thread of this process."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("drivetrain")


class ThreadedSave:
    """One save in its own thread. The interpreter does not end before it has.

    Args:
        work: Does it.
        path: Where to; for messages, and for who waits for it.
    """

    def __init__(self, work: Callable[[], None], path: str) -> None:
        self.path = path
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None
        self._told = False
        # Not a daemon: those are cut off in the middle when the interpreter ends.
        self._thread = threading.Thread(target=self._run, name="drivetrain-save", daemon=False)
        _unheard.add(self)
        self._thread.start()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return once it has ended. Raises what went wrong."""
        self._thread.join()
        self._told = True
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Return once it has ended. What went wrong is still to be told."""
        self._thread.join()

    def report(self) -> None:
        """Log what went wrong, if nobody has asked until the interpreter ends."""
        if self._error is not None and not self._told:
            _log.error("The save of %r failed: %s", self.path, self._error)

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error
        finally:
            self._work = None  # with the staged tensors


_unheard: Final[weakref.WeakSet[ThreadedSave]] = weakref.WeakSet()


@atexit.register
def _report() -> None:
    """Runs after the interpreter has waited for the threads."""
    for each in tuple(_unheard):
        each.report()
