"""Directories that appear and disappear as a whole, also when the power fails in between."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import socket
import sys
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import xxhash

from drivetrain_toolkit import directfile

if TYPE_CHECKING:
    from collections.abc import Callable

_EXCHANGE: Final = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE: Final = -100  # AT_FDCWD: relative names start at the current directory
_CHUNK: Final = 1 << 20


def write_file(
    path: str, fill: Callable[[Callable[[Any], None]], None], size: int = 0
) -> tuple[int, str]:
    """Write a new file and return once it is on the disk.

    Args:
        path: A name that does not exist.
        fill: Called with a function that appends bytes.
        size: About how many, where that is known.

    Returns:
        Its size in bytes, and the XXH3 hash (128 bits, hexadecimal) of what was written.
    """
    if directfile.OFFERED and size >= directfile.WORTH_IT:
        with directfile.DirectFile(path, size) as large:
            fill(large.append)
        return large.size, large.hexdigest()
    digest = xxhash.xxh3_128()
    size = 0
    with open(path, "xb", buffering=0) as file:

        def append(data: Any) -> None:
            nonlocal size
            rest = memoryview(data)
            digest.update(rest)
            size += len(rest)
            while rest:  # an unbuffered file may take a part
                rest = rest[file.write(rest) :]

        fill(append)
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def hash_file(path: str) -> str:
    """The XXH3 hash of a file, as ``write_file`` returns it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def sync_directory(path: str) -> None:
    """Return once the names in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directories(path: str) -> None:
    """Make a directory and what is missing above it; return once their names are on the disk."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    make_directories(above)
    os.makedirs(path, exist_ok=True)
    sync_directory(above)


def hidden_sibling(path: str, token: str = "") -> str:
    """A new hidden name beside ``path`` that says which process uses it, and ends in a token."""
    folder, name = os.path.split(path)
    token = token or secrets.token_hex(4)
    return os.path.join(folder, f"{_prefix(name)}{socket.gethostname()}.{os.getpid()}.{token}")


def hidden_with_token(path: str, token: str) -> str | None:
    """The hidden sibling that some process made with this token, if it is there."""
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return None
    for each in names:
        if each.startswith(_prefix(name)) and each.endswith(f".{token}"):
            return os.path.join(folder, each)
    return None


def replaced_name(path: str) -> str:
    """Where the old directory is for a moment, on systems that cannot exchange two names."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.replaced")


def publish(draft: str, path: str) -> None:
    """Give the complete directory ``draft`` the name ``path``; what was there before is deleted.

    Before and after, and at any moment in between, ``path`` is one complete directory. Where the
    system cannot exchange two names in one go, the old one is called ``replaced_name(path)`` for
    that moment, and readers look there too.
    """
    folder = os.path.dirname(path)
    if not os.path.lexists(path):
        os.rename(draft, path)
        sync_directory(folder)
        discard(replaced_name(path))
        return
    if exchange(draft, path):
        sync_directory(folder)
        discard(draft)
        return
    aside = replaced_name(path)
    discard(aside)
    os.rename(path, aside)
    os.rename(draft, path)
    sync_directory(folder)
    discard(aside)


def withdraw(path: str) -> None:
    """Delete a directory: from view in one step, then from the disk. Missing is not an error."""
    hidden = hidden_sibling(path)
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return
    sync_directory(os.path.dirname(path))
    discard(hidden)


def exchange(first: str, second: str) -> bool:
    """Swap two names in one step. False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), first, None, second)


def discard(path: str) -> None:
    """Delete a file or directory, or what is left of it. Missing is not an error."""
    with suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def sweep(path: str) -> None:
    """Delete what processes that were killed left beside ``path``.

    Drafts of ``path`` itself all go, since it has one writer; those of other names go if their
    process ran on this machine and is gone.
    """
    folder, name = os.path.split(path)
    host = socket.gethostname()
    with os.scandir(folder) as entries:
        drafts = [each.name for each in entries if each.name.startswith(".")]
    for draft in drafts:
        _, found, owner = draft.rpartition(_MARK)
        machine, pid, _ = ("", "", "") if not found else _owner(owner)
        ours = draft.startswith(_prefix(name))
        if ours or (machine == host and pid.isdigit() and not runs(int(pid))):
            discard(os.path.join(folder, draft))


_MARK: Final = ".draft-"


def _prefix(name: str) -> str:
    return f".{name}{_MARK}"


def _owner(text: str) -> tuple[str, str, str]:
    parts = text.rsplit(".", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("", "", "")  # noqa: PLR2004


@cache
def machine() -> str:
    """Equal for processes that see each other's numbers; empty where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def runs(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True
