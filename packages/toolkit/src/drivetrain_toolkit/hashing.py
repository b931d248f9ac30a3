"""Hashes of what is read, made by a second thread while the first one reads on."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Final

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Self

#: Below this a thread costs more than it saves.
_WORTH_A_THREAD: Final = 1 << 23


class Hashing:
    """The XXH3 hash of pieces in the order of ``update``. A context manager.

    A piece must not change until the hash is asked for, or ``free`` gives it back.

    Args:
        size: How many bytes are going to come.
    """

    def __init__(self, size: int) -> None:
        self._digest = xxhash.xxh3_128()
        self._pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if size >= _WORTH_A_THREAD:
            self._thread = threading.Thread(target=self._run, name="drivetrain-hash", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def update(self, piece: Any) -> None:
        """Hash a piece, now or soon."""
        if self._thread is None:
            self._digest.update(piece)
            self._free.put(piece)
        else:
            self._pieces.put(piece)

    def free(self) -> Any:
        """A piece that is hashed; waits for one. Each comes once, in order."""
        return self._free.get()

    def hexdigest(self) -> str:
        """Of everything so far; no more may come."""
        self._end()
        return self._digest.hexdigest()

    def _end(self) -> None:
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)  # without the interpreter's lock
            self._free.put(piece)
