"""Cutting the connections of a process group, so that a thread that waits in it comes back.

Gloo has no way to end an operation from outside: its ``abort`` does nothing, and destroying a group
that a module still holds leaves its connections open. A connection that is shut down ends the
operation on both sides with "connection closed by peer", as the death of a process does.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import Any

_OPEN_FILES = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def open_sockets() -> frozenset[tuple[int, int]]:
    """Descriptor and inode of every socket that this process has open."""
    found = set()
    with suppress(OSError):
        for name in os.listdir(_OPEN_FILES):
            with suppress(OSError, ValueError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(name), status.st_ino))
    return frozenset(found)


def cut(sockets: frozenset[tuple[int, int]]) -> int:
    """Shut down those of the sockets that are still the same; returns how many."""
    count = 0
    for number, inode in sockets:
        with suppress(OSError):  # closed meanwhile
            if os.fstat(number).st_ino != inode:
                continue
            with socket.socket(fileno=os.dup(number)) as held:
                held.getpeername()  # an error for one that listens: gloo aborts if that one goes
                held.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def abort_group(group: Any, sockets: frozenset[tuple[int, int]]) -> None:
    """End every operation of a process group; of gloo's, by its sockets."""
    cut(sockets)
    abort = getattr(group, "abort", None)  # since torch 2.6; for NCCL it is what helps
    if abort is not None:
        with suppress(RuntimeError):
            abort()
