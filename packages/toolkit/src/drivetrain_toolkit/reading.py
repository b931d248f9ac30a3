"""From the files of a checkpoint back to tensors: checked first, hashed on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import xxhash
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_named
from drivetrain_toolkit.jsontext import TooMuchError, parse_json
from drivetrain_toolkit.manifest import (
    LONGEST_MANIFEST,
    LONGEST_STATE,
    MANIFEST,
    Manifest,
    damaged,
    volume,
)
from drivetrain_toolkit.tensorfile import (
    BadFileError,
    Slot,
    fill,
    pieces,
    read_header,
    stored_as,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_toolkit.manifest import ShardEntry
    from drivetrain_toolkit.stores import Source
    from drivetrain_toolkit.tensorfile import Readable

# Small enough to be hashed while it is in the processor's cache: a second thread does no better.
_CHUNK: Final = 1 << 18
_LENGTH: Final = 8

#: By key of a file: the name of the tensor, and which part of it that is.
Parts = dict[str, tuple[str, "ShardEntry"]]


def read_manifest(source: Source) -> Manifest:
    """The manifest, once names and sizes of all files agree with it.

    Raises:
        CheckpointError: The directory is no complete checkpoint.
    """
    manifest = parse_manifest(source)
    for name, how in file_problems(source, manifest):
        raise damaged(source.path, name, how)
    return manifest


def parse_manifest(source: Source) -> Manifest:
    """The manifest, whatever the other files are like. Raises ``CheckpointError``."""
    size = source.files.get(MANIFEST)
    if size is None:
        raise CheckpointError(
            f"The directory {source.path!r} was to be read as a checkpoint, and has no {MANIFEST}.",
            "Give the path of a directory that a checkpoint was saved to.",
        )
    if size > LONGEST_MANIFEST:
        raise damaged(source.path, MANIFEST, f"it has {size} bytes")
    return Manifest.parse(_whole(source, MANIFEST), source.path, _beside(source, MANIFEST))


def file_problems(source: Source, manifest: Manifest) -> list[tuple[str, str]]:
    """Which files are not as the manifest says, and how: by their names and sizes alone."""
    found: list[tuple[str, str]] = []
    present = source.files
    parts = parts_by_file(manifest)
    for name, (size, _) in sorted(manifest.files.items()):
        if name not in present:
            found.append((name, "it is missing"))
        elif present[name] != size:
            found.append((name, f"it has {present[name]} bytes of {size}"))
        elif name != manifest.state and _bytes_of(manifest, parts[name]) > size - _LENGTH:
            found.append((name, "it is too small for its tensors"))
    if source.exact:
        extra = present.keys() - manifest.files.keys() - {MANIFEST}
        found.extend((name, "the manifest does not name it") for name in sorted(extra))
    return found


def content_problem(source: Source, manifest: Manifest, name: str) -> str:
    """How a file's content differs from what was written; empty if it does not."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    with source.open(name) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    changed = digest.hexdigest() != manifest.files[name][1]
    return "its content is not what was written" if changed else ""


def parse_state(source: Source, manifest: Manifest) -> Any:
    """The tree as JSON values, verified."""
    size = source.files[manifest.state]
    if size > LONGEST_STATE:
        raise damaged(source.path, manifest.state, f"it has {size} bytes")
    data = _whole(source, manifest.state)
    _require_hash(source, manifest, manifest.state, xxhash.xxh3_128_hexdigest(data))
    try:
        return parse_json(data, _beside(source, manifest.state), decoded=True)
    except TooMuchError as error:
        raise damaged(source.path, manifest.state, str(error)) from error
    except (ValueError, RecursionError) as error:
        how = f"it is not JSON ({type(error).__name__})"
        raise damaged(source.path, manifest.state, how) from error


def read_all(source: Source, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Every tensor on the host, each with memory of its own. Nothing is read twice.

    Raises:
        CheckpointError: A file is damaged, or holds something else than the manifest says.
    """
    wholes = {
        name: torch.empty(facts.shape, dtype=dtype_named(facts.dtype))
        for name, facts in manifest.tensors.items()
    }
    for name, parts in parts_by_file(manifest).items():
        digest = xxhash.xxh3_128()
        with source.open(name) as file:
            for slot in _checked_header(source, manifest, name, parts, file, digest.update):
                owner, shard = parts[slot.key]
                place = box(wholes[owner], shard.start, shard.shape)
                if place.is_contiguous():
                    _read_into(source, name, file, place, digest.update)
                else:
                    piece = torch.empty(shard.shape, dtype=place.dtype)
                    _read_into(source, name, file, piece, digest.update)
                    place.copy_(piece)
            _require_hash(source, manifest, name, digest.hexdigest())
    return wholes


def slots_of(source: Source, manifest: Manifest, name: str) -> dict[str, tuple[int, Slot]]:
    """Where a file's tensors are: by key, the offset of the first byte in the file."""
    read = 0

    def count(data: Any) -> None:
        nonlocal read
        read += len(data)

    parts = parts_by_file(manifest)[name]
    with source.open(name) as file:
        slots = _checked_header(source, manifest, name, parts, file, count)
    return {slot.key: (read + slot.begin, slot) for slot in slots}


def parts_by_file(manifest: Manifest) -> dict[str, Parts]:
    """What the manifest says is in each file."""
    found: dict[str, Parts] = {name: {} for name in manifest.files if name != manifest.state}
    for name, facts in manifest.tensors.items():
        for shard in facts.shards:
            found[shard.file][shard.key] = (name, shard)
    return found


def box(whole: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """A view of a part of a tensor."""
    for dimension, (first, size) in enumerate(zip(start, shape, strict=True)):
        whole = whole.narrow(dimension, first, size)
    return whole


def _checked_header(
    source: Source,
    manifest: Manifest,
    name: str,
    parts: Parts,
    file: Readable,
    seen: Callable[[Any], None],
) -> list[Slot]:
    try:
        others = _beside(source, name)
        slots = read_header(file, manifest.files[name][0], seen, others)
    except BadFileError as error:
        raise damaged(source.path, name, str(error)) from error
    if len(slots) != len(parts):
        raise damaged(source.path, name, f"it holds {len(slots)} tensors, not {len(parts)}")
    for slot in slots:
        if slot.key not in parts:
            raise damaged(source.path, name, f"the manifest does not name its {slot.key[:80]!r}")
        owner, shard = parts[slot.key]
        dtype = manifest.tensors[owner].dtype
        if (slot.dtype, slot.shape) != stored_as(dtype_named(dtype), shard.shape):
            raise damaged(source.path, name, f"its {slot.key[:80]!r} is not {dtype} {shard.shape}")
    return slots


def _read_into(
    source: Source,
    name: str,
    file: Readable,
    tensor: torch.Tensor,
    seen: Callable[[Any], None],
) -> None:
    try:
        for piece in pieces(tensor, _CHUNK):
            fill(file, piece, seen)
    except BadFileError as error:
        raise damaged(source.path, name, str(error)) from error


def _beside(source: Source, name: str) -> int:
    """Bytes of all files but one."""
    return sum(source.files.values()) - source.files[name]


def _whole(source: Source, name: str) -> bytearray:
    data = bytearray(source.files[name])
    with source.open(name) as file:
        try:
            fill(file, memoryview(data))
        except BadFileError as error:
            raise damaged(source.path, name, str(error)) from error
    return data


def _require_hash(source: Source, manifest: Manifest, name: str, digest: str) -> None:
    if digest != manifest.files[name][1]:
        raise damaged(source.path, name, "its content is not what was written")


def _bytes_of(manifest: Manifest, parts: Mapping[str, tuple[str, ShardEntry]]) -> int:
    return sum(
        volume(shard.shape) * dtype_named(manifest.tensors[owner].dtype).itemsize
        for owner, shard in parts.values()
    )
