"""Which checkpoint a run goes on from, when it is asked for the last one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from heapq import merge
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    CheckpointError,
    StorageError,
    SupportsListing,
    SupportsVerify,
)

from drivetrain import pointers, sharing, snapshot
from drivetrain.callbacks.naming import EXTENSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain_interfaces import CheckpointIO

    from drivetrain.runtime import Stack
    from drivetrain.trainer import Trainer

log = logging.getLogger("drivetrain")

LAST = "last"


@dataclass(frozen=True)
class Found:
    """The checkpoint of a run.

    Attributes:
        path: Where it is; None to begin anew.
        tree: What is in it, where it was read already: on rank 0.
    """

    path: str | None = None
    tree: dict[str, Any] | None = None

    def read(self, stack: Stack) -> dict[str, Any] | None:
        """What is in it; None to begin anew. Every rank calls it."""
        if self.path is None or self.tree is not None:
            return self.tree
        return snapshot.open_checkpoint(self.path, stack)


def find(trainer: Trainer, asked: str | None, stage: str) -> Found:
    """The checkpoint that was asked for. ``"last"`` is the newest that is complete and verified.

    Every rank calls it; rank 0 looks, and says once what it left out and why.

    Raises:
        CheckpointError: There are checkpoints, and none of them can be used.
        StorageError: There is none, and ``stage`` needs one.
    """
    if asked != LAST:
        return Found(asked)
    found, problem = Found(), None
    if trainer.is_global_zero:
        try:
            found = _newest(trainer, stage)
        except (CheckpointError, StorageError) as error:
            problem = error
    said = None if problem is None else (type(problem) is StorageError, *problem.args)
    path, said = trainer.collectives.broadcast_object((found.path, said))
    if said is not None:
        kind = StorageError if said[0] else CheckpointError
        raise kind(*said[1:])
    return found if trainer.is_global_zero else Found(path)


def _newest(trainer: Trainer, stage: str) -> Found:
    checkpoint_io = trainer.checkpoint_io
    skipped: list[tuple[str, str]] = []
    for path in _candidates(trainer):
        why, tree = _tried(checkpoint_io, path, full=stage == "fit")
        if tree is not None:
            _say_what_was_skipped(skipped, path)
            # Where ranks read their own parts, the whole is not kept on this one.
            return Found(path, None if sharing.reads_parts(trainer.runtime.stack) else tree)
        skipped.append((path, why))
    if skipped:
        listed = "; ".join(f"{path!r}: {why}" for path, why in skipped)
        raise CheckpointError(
            f"ckpt_path='last' was asked for, and none of {len(skipped)} checkpoints can be used: "
            f"{listed}",
            "Give the path of a checkpoint that is whole, or move these away to begin anew.",
        )
    where = ", ".join(_directories(trainer))
    if not where:
        raise StorageError(
            "ckpt_path='last' was asked for, and no callback of this Trainer saves checkpoints.",
            "Give the path of a checkpoint.",
        )
    if stage != "fit":
        raise StorageError(
            f"ckpt_path='last' was asked for, and there is no checkpoint in {where}.",
            "Give the path of a checkpoint.",
        )
    log.warning(
        "ckpt_path='last' was asked for, and there is no checkpoint in %s yet: "
        "training begins anew.",
        where,
    )
    return Found()


def _tried(
    checkpoint_io: CheckpointIO, path: str, *, full: bool
) -> tuple[str, dict[str, Any] | None]:
    """The tree of a checkpoint, or why it cannot be used. Loading it verifies it."""
    if isinstance(checkpoint_io, SupportsVerify) and not checkpoint_io.exists(path):
        # Incomplete: the reasons of a verification say more than the first error of a load.
        return "; ".join(checkpoint_io.verify(path)) or "it is not complete", None
    try:
        tree = pointers.load(checkpoint_io, path)
    except (CheckpointError, StorageError) as error:
        return error.message, None
    missing = snapshot.lacks(tree) if full else []
    if missing:
        return f"it holds no {', '.join(missing)}, as one of weights alone", None
    return "", tree


def _candidates(trainer: Trainer) -> Iterator[str]:
    """Paths to try, the newest first, each once."""
    seen: set[str] = set()
    for path in _in_order(trainer):
        plain = path if pointers.is_remote(path) else os.path.realpath(path)
        if plain not in seen:
            seen.add(plain)
            yield plain


def _in_order(trainer: Trainer) -> Iterator[str]:
    # What this Trainer itself has saved is newer than what it finds.
    for each in trainer.callbacks:
        if path := getattr(each, "last_model_path", ""):
            yield path
    checkpoint_io = trainer.checkpoint_io
    if not isinstance(checkpoint_io, SupportsListing):
        return
    lists = [
        _with_broken(folder, list(checkpoint_io.list(folder))) for folder in _directories(trainer)
    ]
    yield from merge(*lists, key=lambda path: -_age(path))


def _with_broken(folder: str, complete: list[str]) -> list[str]:
    """What is complete, with what only looks like a checkpoint where its age puts it."""
    if not os.path.isdir(folder):
        return complete
    with os.scandir(folder) as entries:
        broken = [
            entry.path
            for entry in entries
            if entry.name.endswith(EXTENSION)
            and not entry.name.startswith(".")
            and entry.is_dir(follow_symlinks=False)
            and entry.path not in complete
        ]
    # Positions of complete ones are their own order; a broken one goes before the first older.
    result = list(complete)
    for path in broken:
        older = (n for n, other in enumerate(result) if _age(other) < _age(path))
        result.insert(next(older, len(result)), path)
    return result


def _age(path: str) -> float:
    """When a directory was last changed; 0.0 where that is not known."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _directories(trainer: Trainer) -> list[str]:
    """Where callbacks of this Trainer save, each once."""
    found = [
        where(trainer)
        for each in trainer.callbacks
        if callable(where := getattr(each, "directory", None))
    ]
    return list(dict.fromkeys(found))


def _say_what_was_skipped(skipped: list[tuple[str, str]], path: str) -> None:
    for each, why in skipped:
        log.warning("ckpt_path='last' leaves out %s: %s", each, why)
    if skipped:
        log.warning("The run goes on from %s.", path)
