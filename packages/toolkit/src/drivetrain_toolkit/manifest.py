"""What makes a directory a checkpoint: the file that names, measures and vouches for all others.

The format is specified in docs/checkpoints.md. Everything in a manifest is checked before anything
is done with it, since it may come from anybody.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import xxhash
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_named
from drivetrain_toolkit.jsontext import BadJSONError, TooMuchError, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT: Final = "drivetrain.checkpoint"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
#: Longer ones are not read: a manifest takes a few hundred bytes per tensor.
LONGEST_MANIFEST: Final = 1 << 28
#: Neither are longer trees, nor written.
LONGEST_STATE: Final = 1 << 28

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_HASH: Final = re.compile(r"[0-9a-f]{32}")
_NO_HASH: Final = "0" * 32
# The file ends with the hash, a quotation mark and a closing brace on a line of its own.
_HASH_AT: Final = slice(-36, -4)
_MOST_DIMENSIONS: Final = 64
_MOST_CUTS: Final = 6
_MOST_CORNERS: Final = 1 << 16
_LARGEST: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A part of a tensor: where it is kept, and where it begins in the whole.

    Attributes:
        file: The file that holds it.
        key: What the file calls it.
        start: Where it begins in the whole, one number per dimension.
        shape: Its own.
    """

    file: str
    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a manifest says about a tensor: the name of its dtype, its shape, and its parts."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[ShardEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What makes a directory a checkpoint.

    Attributes:
        created: Time of saving, UTC, ISO 8601 with microseconds, so that text order is time order.
        producer: Distributions and versions that wrote it.
        contract: The contract that they were written for.
        world_size: Processes of the run, or None where the writer was not told.
        files: Size in bytes and XXH3 hash by file name.
        tensors: By name, which is the place in the tree.
        state: The file that holds the tree.
        id: Letters and digits that tell this save from every other one.
    """

    created: str
    producer: str
    contract: str
    world_size: int | None
    files: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, TensorFacts]
    state: str = STATE
    id: str = ""

    def text(self) -> bytes:
        """The bytes of the file. The same manifest always has the same."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "contract": self.contract,
            "producer": self.producer,
            "created": self.created,
            "id": self.id,
            "world_size": self.world_size,
            "state": self.state,
            "files": {
                name: {"size": size, "xxh3_128": digest}
                for name, (size, digest) in sorted(self.files.items())
            },
            "tensors": {name: _tensor_body(facts) for name, facts in sorted(self.tensors.items())},
            "xxh3_128": _NO_HASH,
        }
        text = bytearray(json.dumps(body, indent=1).encode("ascii") + b"\n")
        text[_HASH_AT] = xxhash.xxh3_128_hexdigest(text).encode("ascii")
        return bytes(text)

    @classmethod
    def parse(cls, text: bytes | bytearray, path: str, others: int = 0) -> Manifest:
        """Read it, and make sure that not one bit has changed and that everything in it adds up.

        Args:
            text: The file. A ``bytearray`` is empty afterwards.
            path: The checkpoint, for messages.
            others: Bytes of its other files.

        Raises:
            CheckpointError: It is damaged, of another format, or of a later version.
        """
        try:
            digest = _hash_of(text)
            body = parse_json(text, others)
            _refuse_later_version(body, path)
            manifest = _parsed(body) if digest == body["xxh3_128"] else None
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            told = isinstance(error, (_RefusedError, BadJSONError, TooMuchError))
            reason = str(error) if told else type(error).__name__
            raise damaged(path, MANIFEST, f"it is not readable ({reason})") from error
        if manifest is None:
            raise damaged(path, MANIFEST, "it is not as it was written")
        return manifest


def damaged(folder: str, name: str, how: str) -> CheckpointError:
    """The error for a checkpoint with a file that is not as it should be."""
    return CheckpointError(
        f"The checkpoint {folder!r} cannot be used because of its file {name!r}: {how}.",
        "Use another checkpoint.",
    )


def volume(shape: Sequence[int]) -> int:
    """The number of items of a shape."""
    return math.prod(shape)


class _RefusedError(ValueError):
    """Says in its text what does not add up."""


def _hash_of(text: bytes | bytearray) -> str:
    """The hash of a manifest with zeros in the place of its hash."""
    digest = xxhash.xxh3_128()
    start, stop = _HASH_AT.start, _HASH_AT.stop
    with memoryview(text) as view:
        for piece in (view[:start], _NO_HASH.encode("ascii"), view[stop:]):
            digest.update(piece)
    return digest.hexdigest()


def _tensor_body(facts: TensorFacts) -> dict[str, Any]:
    return {
        "dtype": facts.dtype,
        "shape": list(facts.shape),
        "shards": [
            {
                "file": shard.file,
                "key": shard.key,
                "start": list(shard.start),
                "shape": list(shard.shape),
            }
            for shard in facts.shards
        ],
    }


def _refuse_later_version(body: Any, path: str) -> None:
    if body["format"] != FORMAT:
        raise _RefusedError(f"it is of the format {reprlib.repr(body['format'])}")
    if body["version"] != VERSION:
        raise CheckpointError(
            f"The checkpoint {path!r} has format version {reprlib.repr(body['version'])}, "
            f"and version {VERSION} can be read here.",
            "Upgrade drivetrain-toolkit.",
        )


def _parsed(body: dict[str, Any]) -> Manifest:
    files = {_name(name): _file(entry) for name, entry in body["files"].items()}
    if len({name.casefold() for name in files}) != len(files) or MANIFEST in files:
        raise _RefusedError("two files have the same name")
    state = _text(body["state"])
    _require(state in files, f"it does not name {reprlib.repr(state)} among its files")
    tensors = {name: _tensor(entry) for name, entry in body["tensors"].items()}
    keys = [(s.file, s.key) for facts in tensors.values() for s in facts.shards]
    _require(len(set(keys)) == len(keys), "two shards are kept at the same place")
    holders = {file for file, _ in keys}
    for file in holders:
        _require(file in files and file != state, f"a shard is in {file!r}, which is no such file")
    world_size = body["world_size"]
    return Manifest(
        created=_text(body["created"]),
        producer=_text(body["producer"]),
        contract=_text(body["contract"]),
        world_size=None if world_size is None else _count(world_size),
        files=files,
        tensors=tensors,
        state=state,
        id=_text(body["id"]),
    )


def _file(entry: dict[str, Any]) -> tuple[int, str]:
    digest = _text(entry["xxh3_128"])
    _require(_HASH.fullmatch(digest) is not None, f"{reprlib.repr(digest)} is not a hash")
    return _count(entry["size"]), digest


def _tensor(entry: dict[str, Any]) -> TensorFacts:
    dtype, shape = _text(entry["dtype"]), _numbers(entry["shape"])
    _require(volume(shape) * dtype_named(dtype).itemsize <= _LARGEST, "a tensor is too large")
    shards = tuple(
        ShardEntry(
            _name(shard["file"]),
            _text(shard["key"]),
            _numbers(shard["start"]),
            _numbers(shard["shape"]),
        )
        for shard in entry["shards"]
    )
    problem = tiling_problem(shape, [(shard.start, shard.shape) for shard in shards])
    _require(not problem, problem)
    return TensorFacts(dtype, shape, shards)


def tiling_problem(
    shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> str:
    """What keeps boxes (start and shape) from making up a whole, each item once; else empty.

    Boxes tile the whole exactly if their corners, counted with alternating signs, cancel to those
    of the whole: that takes time in proportion to their number, however they lie.
    """
    for start, extent in boxes:
        if len(start) != len(shape) or len(extent) != len(shape):
            return f"a shard of {extent} at {start} has other dimensions than {shape}"
        if any(s + e > whole for s, e, whole in zip(start, extent, shape, strict=True)):
            return f"a shard of {extent} at {start} leaves {shape}"
    solid = [(start, extent) for start, extent in boxes if volume(extent)]
    if not volume(shape):
        return "" if boxes else f"nothing holds the shape of {shape}"
    cut = [  # other dimensions say nothing: every box has them whole
        d for d, size in enumerate(shape) if any(extent[d] != size for _, extent in solid)
    ]
    several = len(cut) > 2  # noqa: PLR2004 - so many corners that they would fill the memory
    if len(cut) > _MOST_CUTS or (several and len(solid) << len(cut) > _MOST_CORNERS):
        return f"{len(solid)} shards are cut along {len(cut)} dimensions, which are too many"
    corners: Counter[tuple[int, ...]] = Counter()
    for start, extent, sign in (*((s, e, 1) for s, e in solid), ((0,) * len(shape), shape, -1)):
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(start[d] + end * extent[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return f"{len(boxes)} shards do not make up {shape}" if any(corners.values()) else ""


def _require(fact: bool, otherwise: str) -> None:  # noqa: FBT001 - reads like an assertion
    if not fact:
        raise _RefusedError(otherwise)


def _text(value: Any) -> str:
    _require(type(value) is str, f"{reprlib.repr(value)} is not text")
    return str(value)


def _name(value: Any) -> str:
    _require(
        type(value) is str and _NAME.fullmatch(value) is not None,
        f"{reprlib.repr(value)} is no file name",
    )
    return str(value)


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value <= _LARGEST, f"{reprlib.repr(value)} is not a count")
    return int(value)


def _numbers(value: Any) -> tuple[int, ...]:
    _require(
        type(value) is list and len(value) <= _MOST_DIMENSIONS, f"{reprlib.repr(value)} is no shape"
    )
    return tuple(_count(each) for each in value)
