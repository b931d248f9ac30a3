"""Large files that go to the disk past the page cache, and are hashed on their way.

Bytes are copied into a few aligned buffers, which threads write at their places. That is faster
than the cache for what is synced at once, and leaves to training what it has in the cache. Where a
file system refuses it, the same bytes go through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK: Final = 4096  # every disk's logical block divides it
_BUFFER: Final = 1 << 22
_BUFFERS: Final = 4
_WRITERS: Final = 2
_BY_ADDRESS: Final = 1 << 16  # smaller pieces are copied while the interpreter's lock is held
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_NOT_OFFERED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
#: Whether the system has what this needs, and from what size the threads are worth it.
OFFERED: Final = sys.platform == "linux" and bool(_DIRECT)
WORTH_IT: Final = 1 << 25


class DirectFile:
    """A new file, on the disk when it is left without an error. A context manager.

    Args:
        path: A name that does not exist.
        size: About how many bytes are going to come. Room for them is claimed at once.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._room = size
        self._digest = xxhash.xxh3_128()
        self._handle = -1
        self._direct = True
        self._begin = 0  # of the buffer that is being filled, in the file
        self._used = 0
        self._current = 0
        self._buffers = _buffers()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._handle, self._direct = _opened(self._path)
        try:
            _claim(self._handle, self._room, self._path)
            for number in range(1, _BUFFERS):
                self._free.put(number)
            for _ in range(_WRITERS):
                thread = threading.Thread(target=self._run, name="drivetrain-write", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            self._join()
            if kind is None:
                self._finish()
        finally:
            self._close()

    @property
    def size(self) -> int:
        """How many bytes have come."""
        return self._begin + self._used

    def append(self, data: Any) -> None:
        """Add bytes. They may change once this has returned.

        Raises:
            OSError: What was added before cannot be written.
        """
        rest = memoryview(data).cast("B")
        while rest:
            count = min(len(rest), _BUFFER - self._used)
            buffer = self._buffers[self._current]
            _copy(rest[:count], buffer[self._used : self._used + count])
            rest = rest[count:]
            self._used += count
            if self._used == _BUFFER:
                self._digest.update(buffer)
                self._full.put((self._current, self._begin))
                self._begin += _BUFFER
                self._current, self._used = self._free.get(), 0
                self._raise()

    def hexdigest(self) -> str:
        """The XXH3 hash (128 bits) of all bytes, once the file is left."""
        return self._digest.hexdigest()

    def _finish(self) -> None:
        """The rest, which fills no block, through the cache; and all of it to the disk."""
        self._raise()
        rest = self._buffers[self._current][: self._used]
        self._digest.update(rest)
        self._through_cache()
        self._write(rest, self._begin)
        if self.size < self._room:
            os.ftruncate(self._handle, self.size)
        os.fsync(self._handle)

    def _run(self) -> None:
        while (task := self._full.get()) is not None:
            number, begin = task
            if self._error is None:
                try:
                    self._write(self._buffers[number], begin)
                except OSError as error:
                    self._error = error
            self._free.put(number)

    def _write(self, rest: memoryview, begin: int) -> None:
        while rest:
            direct = self._direct
            try:
                count = os.pwrite(self._handle, rest, begin)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._through_cache()  # a disk with other blocks, or a file system that cannot
                continue
            rest, begin = rest[count:], begin + count
            if count % _BLOCK:
                self._through_cache()

    def _through_cache(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~_DIRECT)
        self._direct = False

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _close(self) -> None:
        self._join()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _opened(path: str) -> tuple[int, bool]:
    """The handle of a new file, and whether writing goes past the cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL | _DIRECT, 0o666), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666), False  # the refused call may have made the name


def _claim(handle: int, size: int, path: str) -> None:
    """Claim room on the disk, so that writers need not wait for each other to extend the file.

    Raises:
        OSError: There is not so much.
    """
    # posix_fallocate writes to every block where the file system cannot claim: never that.
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None or not size:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(handle, 0, 0, size):
        number = ctypes.get_errno()
        if number not in _NOT_OFFERED:
            raise OSError(number, os.strerror(number), path)


def _buffers() -> list[memoryview]:
    memory = mmap.mmap(-1, _BUFFERS * _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # large pages, where there are some
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    return [view[n * _BUFFER : (n + 1) * _BUFFER] for n in range(_BUFFERS)]


def _copy(source: memoryview, target: memoryview) -> None:
    if source.readonly or len(source) < _BY_ADDRESS:
        target[:] = source
    else:  # without the interpreter's lock, so that training goes on meanwhile
        ctypes.memmove(_address(target), _address(source), len(source))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
