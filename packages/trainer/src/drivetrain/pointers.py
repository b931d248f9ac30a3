"""A second name for a checkpoint: a link, or where links cannot be, a checkpoint that names it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces import CheckpointError, SupportsInspect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces import CheckpointIO

_KEY: Final = "same_as"


def is_remote(path: str) -> bool:
    """Whether a path is a URL, which means nothing to the functions of ``os``."""
    return "://" in path


def absolute(path: str | os.PathLike[str]) -> str:
    """The path from the root; a URL stays as it is."""
    text = os.fspath(path)
    return text if is_remote(text) else os.path.abspath(text)


def is_pointer(path: str, checkpoint_io: CheckpointIO) -> bool:
    """Whether ``point`` has made it: a link to something beside it, or a checkpoint with a name."""
    if os.path.islink(path):
        target = os.readlink(path)
        return os.path.basename(target) == target
    try:
        return _target(checkpoint_io.load(path)) is not None
    except (CheckpointError, OSError):  # damaged or foreign, so not ours to replace
        return False


def point(name: str, target: str, checkpoint_io: CheckpointIO) -> None:
    """Let ``name`` stand for ``target`` in the same directory, from one moment to the next.

    A relative symbolic link where there can be one, and else a tiny checkpoint that ``load``
    follows, so that it works on any file system, in any store, and with any checkpoint IO.

    Raises:
        StorageError: Neither can be written.
    """
    if os.path.lexists(target) and (os.path.islink(name) or not os.path.lexists(name)):
        with suppress(OSError):  # then it is a file system without links
            _link(name, os.path.basename(target))
            return
    checkpoint_io.save({_KEY: os.path.basename(target)}, name)


def load(checkpoint_io: CheckpointIO, path: str) -> dict[str, Any]:
    """The tree of a checkpoint, or of the one that a pointer names.

    Raises:
        CheckpointError: It is missing, corrupt or foreign, or a pointer leaves its directory.
    """
    return follow(checkpoint_io.load, path)


def follow(read: Callable[[str], dict[str, Any]], path: str) -> dict[str, Any]:
    """As ``load``, with another function that reads a tree."""
    tree = read(path)
    target = _target(tree)
    if target is None:
        return tree
    if target in {"", ".", ".."} or os.path.basename(target) != target:
        raise CheckpointError(
            f"The checkpoint {path!r} stands for {target!r}, which is not a name beside it.",
            "Give the path of the checkpoint itself.",
        )
    return read(os.path.join(os.path.dirname(path), target))


def names_another(checkpoint_io: CheckpointIO, path: str) -> bool:
    """Whether a checkpoint that is whole does nothing but stand for another."""
    if isinstance(checkpoint_io, SupportsInspect):
        facts = checkpoint_io.inspect(path)
        return not facts.tensors and _target(facts.values) is not None
    return _target(checkpoint_io.load(path)) is not None


def _target(tree: Mapping[str, Any]) -> str | None:
    target = tree.get(_KEY) if len(tree) == 1 else None
    return target if isinstance(target, str) else None


def _link(name: str, target: str) -> None:
    directory, base = os.path.split(name)
    temporary = os.path.join(directory, f".{base}.{os.getpid()}")
    if os.path.lexists(temporary):  # left by a process that died
        os.remove(temporary)
    os.symlink(target, temporary)
    try:
        os.replace(temporary, name)
    except OSError:
        os.remove(temporary)
        raise
    sync_directory(directory)


def sync_directory(directory: str) -> None:
    """Return once the names in a directory are on the disk, where the system can tell."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
