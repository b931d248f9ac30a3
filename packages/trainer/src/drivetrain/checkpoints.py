"""Looking after checkpoints outside a run: verify, inspect, compare, convert, prune, import.

The functions of ``drivetrain checkpoint``. They work through a checkpoint IO, by default that of
the best available backend; one without an ability is refused by name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    CheckpointError,
    SupportsConvert,
    SupportsInspect,
    SupportsPrune,
    SupportsVerify,
    UnsupportedError,
)

from drivetrain import lightning_file, pointers
from drivetrain.snapshot import default_io

if TYPE_CHECKING:
    from drivetrain_interfaces import CheckpointIO
    from drivetrain_interfaces.checkpoint import CheckpointFacts, Difference

    from drivetrain.module import Module

FORMS = ("directory", "torch", "safetensors")

Path = str | os.PathLike[str]


def verify(path: Path, checkpoint_io: CheckpointIO | None = None) -> list[str]:
    """What is wrong with a checkpoint, one line each; nothing if it is complete and unchanged.

    Raises:
        StorageError: It cannot be read at all.
    """
    path = pointers.absolute(path)
    checkpoint_io = checkpoint_io or default_io(path)
    if isinstance(checkpoint_io, SupportsVerify):
        found = list(checkpoint_io.verify(path))
        if found or not pointers.names_another(checkpoint_io, path):
            return found
    try:
        pointers.load(checkpoint_io, path)
    except CheckpointError as error:
        return [error.message]
    return []


def inspect(path: Path, checkpoint_io: CheckpointIO | None = None) -> CheckpointFacts:
    """What a checkpoint or single file says about itself, without reading its tensors.

    Raises:
        CheckpointError: It is missing, damaged or foreign.
    """
    path = pointers.absolute(path)
    able: SupportsInspect = _able(checkpoint_io or default_io(path), SupportsInspect, "inspected")
    return able.inspect(path)


def diff(first: Path, second: Path, checkpoint_io: CheckpointIO | None = None) -> list[Difference]:
    """Where two checkpoints or single files differ; nothing if they hold the same.

    Raises:
        CheckpointError: One is missing, damaged or foreign.
    """
    first, second = pointers.absolute(first), pointers.absolute(second)
    able: SupportsInspect = _able(checkpoint_io or default_io(first), SupportsInspect, "compared")
    return list(able.diff(first, second))


def convert(
    source: Path, target: Path, form: str, checkpoint_io: CheckpointIO | None = None
) -> list[str]:
    """Write what is at ``source`` to ``target`` in another form.

    Args:
        source: A checkpoint, a file that ``torch.load(weights_only=True)`` reads, or safetensors.
        target: Where nothing is yet.
        form: ``"directory"``, ``"torch"`` or ``"safetensors"`` (weights alone).
        checkpoint_io: What reads and writes them.

    Returns:
        What the form cannot hold, one place each.

    Raises:
        CheckpointError: The source is damaged, or there is something at the target.
    """
    source, target = pointers.absolute(source), pointers.absolute(target)
    able: SupportsConvert = _able(checkpoint_io or default_io(source), SupportsConvert, "converted")
    return list(able.convert(source, target, form))


def consolidate(source: Path, target: Path, checkpoint_io: CheckpointIO | None = None) -> list[str]:
    """Write a checkpoint again with its tensors in one file, whoever wrote it. As ``convert``."""
    return convert(source, target, "directory", checkpoint_io)


def prune(directory: Path, keep: int, checkpoint_io: CheckpointIO | None = None) -> list[str]:
    """Remove all but the ``keep`` newest checkpoints of a directory, once these are verified.

    Returns:
        The paths of what went.

    Raises:
        ConfigurationError: None would be left.
        StorageError: Something cannot be read or removed.
    """
    directory = pointers.absolute(directory)
    able: SupportsPrune = _able(checkpoint_io or default_io(directory), SupportsPrune, "pruned")
    return list(able.prune(directory, keep))


def is_lightning(path: Path, checkpoint_io: CheckpointIO | None = None) -> bool:
    """Whether a single file was saved by Lightning."""
    path = pointers.absolute(path)
    checkpoint_io = checkpoint_io or default_io(path)
    if not os.path.isfile(path) or not isinstance(checkpoint_io, SupportsConvert):
        return False
    return lightning_file.MARK in checkpoint_io.read_file(path)


def import_lightning(
    source: Path,
    target: Path,
    module: Module | None = None,
    *,
    strict: bool = True,
    checkpoint_io: CheckpointIO | None = None,
) -> list[str]:
    """Make a checkpoint of a file of Lightning 2.x. No code of the file is run.

    With the module come weights, hyperparameters, optimizers, schedulers, loss scale and counters,
    so that a fit can be resumed; without it, weights and hyperparameters.

    Args:
        source: The ``.ckpt`` file.
        target: The checkpoint to write.
        module: The model that it is for.
        strict: Whether names and shapes must be exactly the module's; otherwise what has the same
            name is taken, and the rest is among what is returned.
        checkpoint_io: What reads and writes them.

    Returns:
        What could not be brought over, one line each.

    Raises:
        CheckpointError: It is no such file, does not fit, or there is something at the target.
    """
    source, target = pointers.absolute(source), pointers.absolute(target)
    checkpoint_io = checkpoint_io or default_io(source)
    able: SupportsConvert = _able(checkpoint_io, SupportsConvert, "imported")
    if os.path.lexists(target) or checkpoint_io.exists(target):
        raise CheckpointError(
            f"A file was to be imported to {target!r}, where something is already.",
            "Give a path where nothing is.",
        )
    tree, refused = lightning_file.imported(able.read_file(source), module, strict=strict)
    checkpoint_io.save(tree, target)
    return refused


def _able(checkpoint_io: Any, kind: type[Any], what: str) -> Any:
    if not isinstance(checkpoint_io, kind):
        raise UnsupportedError(
            f"A checkpoint was to be {what}, and {type(checkpoint_io).__name__} cannot do that.",
            f"Use a checkpoint IO that has the members of {kind.__name__}.",
        )
    return checkpoint_io
