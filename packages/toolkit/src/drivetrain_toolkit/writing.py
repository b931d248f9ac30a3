"""From a tree to the files of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_name, place
from drivetrain_toolkit.jsontext import cost_problem
from drivetrain_toolkit.manifest import (
    LONGEST_STATE,
    STATE,
    Manifest,
    ShardEntry,
    TensorFacts,
    tiling_problem,
)
from drivetrain_toolkit.staging import TensorShelf, nbytes
from drivetrain_toolkit.tensorfile import write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from drivetrain_toolkit.codecs import Codecs
    from drivetrain_toolkit.stores import Draft

TENSORS: Final = "tensors.safetensors"


@dataclass(frozen=True, slots=True)
class Staged:
    """A tree that nobody changes any more.

    Attributes:
        state: As JSON values, with names in place of tensors.
        shelf: The tensors.
    """

    state: Any
    shelf: TensorShelf


@dataclass(frozen=True, slots=True)
class Origin:
    """What a manifest says about its writer."""

    producer: str
    world_size: int | None
    id: str


def stage(tree: Mapping[str, Any], codecs: Codecs, *, copy: bool = False) -> Staged:
    """Encode a tree, with its tensors on the host; copies of them if they are going to change.

    Raises:
        CheckpointError: A value has no codec or a tensor no bytes; says where.
    """
    shelf = TensorShelf(copy=copy)
    state = codecs.encode(tree, shelf.keep)
    shelf.forget_originals()
    return Staged(state, shelf)


def state_text(state: Any, others: int) -> bytes:
    """The bytes of the file with the tree.

    Args:
        state: The tree as JSON values.
        others: Bytes of the tensors.

    Raises:
        CheckpointError: They are so many that nobody would read them.
    """
    text = json.dumps(state, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(text) > LONGEST_STATE:
        raise CheckpointError(
            f"A checkpoint was to hold {len(text)} bytes of plain values, more than the "
            f"{LONGEST_STATE} that are read.",
            "Keep long lists of numbers in tensors.",
        )
    if how := cost_problem(text, others, decoded=True):
        raise CheckpointError(
            f"A checkpoint was to hold {len(text)} bytes of plain values, and nobody would read "
            f"them: {how}.",
            "Keep long lists of numbers in tensors or arrays.",
        )
    return text


def manifest_text(manifest: Manifest) -> bytes:
    """The bytes of the manifest.

    Raises:
        CheckpointError: They are so many that nobody would read them.
    """
    text = manifest.text()
    others = sum(size for size, _ in manifest.files.values())
    if how := cost_problem(text, others):
        raise CheckpointError(
            f"A checkpoint was to hold {len(manifest.tensors)} tensors, and nobody would read its "
            f"manifest: {how}.",
            "Put small tensors together into larger ones.",
        )
    return text


def write_alone(draft: Draft, staged: Staged, origin: Origin) -> None:
    """Write all of it from one process, and publish it.

    Raises:
        CheckpointError: A shard is not the whole of its tensor.
    """
    file, state = draft.name(TENSORS), draft.name(STATE)
    tensors = dict(staged.shelf.tensors)
    facts = {name: whole(each, file, name) for name, each in tensors.items()}
    for name, shard in staged.shelf.shards.items():
        if tiling_problem(shard.shape, [(shard.start, tuple(shard.data.shape))]):
            raise CheckpointError(
                f"A checkpoint was to be saved by one process, and {place(name)} is only a part "
                f"of shape {tuple(shard.data.shape)} of a tensor of {shard.shape}.",
                "Save it in all processes, with save_sharded.",
            )
        tensors[name] = shard.data
        facts[name] = whole(shard.data, file, name)
    size = nbytes(tensors.values())
    text = state_text(staged.state, size)
    files = {
        file: draft.write(file, lambda write: write_tensors(tensors, write), size),
        state: draft.write(state, lambda write: write(text)),
    }
    draft.publish(manifest_text(manifest_for(origin, files, facts, state)))


def whole(tensor: torch.Tensor, file: str, key: str) -> TensorFacts:
    """What the manifest says of a tensor that is in one piece."""
    shape = tuple(tensor.shape)
    shard = ShardEntry(file, key, (0,) * len(shape), shape)
    return TensorFacts(dtype_name(tensor.dtype), shape, (shard,))


def manifest_for(
    origin: Origin,
    files: Mapping[str, tuple[int, str]],
    tensors: Mapping[str, TensorFacts],
    state: str,
) -> Manifest:
    """The manifest of what has just been written."""
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        producer=origin.producer,
        contract=str(CONTRACT),
        world_size=origin.world_size,
        files=files,
        tensors=tensors,
        state=state,
        id=origin.id,
    )
