"""Tensors in a file of the safetensors format: a JSON header, then bytes. It cannot carry code.

Written and read here rather than by the library, so that bytes go between the tensor and the disk
without a copy of everything in between, are hashed on their way, and a full disk is an ``OSError``
with its number. Every number of a header is checked before memory is allocated for it.
"""

from __future__ import annotations

import ctypes
import json
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from drivetrain_toolkit.jsontext import TooMuchError, parse_json
from drivetrain_toolkit.manifest import volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: Dtypes of files that others wrote, by the names of the format.
DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()} | {
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_ALL_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
#: The format allows no longer header.
LONGEST_HEADER: Final = 100_000_000
_LENGTH: Final = 8
_CHUNK: Final = 1 << 22


class Readable(Protocol):
    """What tensors are read from: a file, or an object of a store."""

    def readinto(self, buffer: Any, /) -> int | None:
        """Fill a part of ``buffer``; returns how many bytes, 0 at the end."""
        ...

    def seek(self, offset: int, /) -> int:
        """Go to a position."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor is in a file: its first and last byte, and how the file describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class BadFileError(ValueError):
    """Says in its text what is wrong with a file of tensors."""


def write_tensors(
    tensors: Mapping[str, torch.Tensor],
    write: Callable[[Any], None],
    *,
    by_others: bool = False,
) -> None:
    """Hand the bytes of a safetensors file to ``write``, piece by piece.

    Args:
        tensors: Contiguous tensors on the host. A dtype that the format lacks is stored as bytes.
        write: Takes anything with the buffer interface.
        by_others: Whether others read it, who know of no manifest: then every dtype is named as the
            format does, also those that came to it late.
    """
    # Large items first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        dtype, shape = (
            (_ALL_NAMES[tensor.dtype], shape) if by_others else stored_as(tensor.dtype, shape)
        )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH)
    write(len(text).to_bytes(_LENGTH, "little") + text)
    for name in order:
        for piece in pieces(tensors[name]):
            write(piece)


def stored_as(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """How a file describes a tensor; as bytes, if the format does not know its dtype."""
    if dtype in _NAMES:
        return _NAMES[dtype], shape
    return "U8", (volume(shape) * dtype.itemsize,)


def pieces(tensor: torch.Tensor, chunk: int = _CHUNK) -> Iterator[memoryview]:
    """The memory of a contiguous tensor on the host, a few megabytes at a time."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return
    memory: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    memory.owner = tensor  # alive as long as a view is
    view = memoryview(memory).cast("B")
    for start in range(0, size, chunk):
        yield view[start : start + chunk]


def read_header(
    file: Readable, size: int, seen: Callable[[Any], None], others: int = 0
) -> list[Slot]:
    """Where a file's tensors are, in the order of their bytes. It is then read up to the first.

    Args:
        file: At its beginning.
        size: Of the file, in bytes.
        seen: Called with what is read, to hash it.
        others: Bytes of what is read besides this file.

    Raises:
        BadFileError: The header is malformed or would fill the memory, or its tensors overlap,
            leave gaps, leave the file or have other sizes than their shapes say.
    """
    length = int.from_bytes(_take(file, _LENGTH, seen), "little")
    if length > min(size - _LENGTH, LONGEST_HEADER):
        raise BadFileError(f"its header would have {length} bytes")
    try:
        others += size - length
        header = parse_json(_take(file, length, seen), others)
        header.pop("__metadata__", None)
        slots = [_slot(key, entry) for key, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = isinstance(error, (BadFileError, TooMuchError))
        reason = str(error) if told else type(error).__name__
        raise BadFileError(f"its header is not readable ({reason})") from error
    slots.sort(key=lambda slot: (slot.begin, slot.end))
    position = 0
    for slot in slots:
        if slot.begin != position:
            raise BadFileError(f"{reprlib.repr(slot.key)} does not begin where the one before ends")
        position = slot.end
    if position != size - _LENGTH - length:
        raise BadFileError(f"its tensors take {position} bytes of {size - _LENGTH - length}")
    return slots


def fill(file: Readable, buffer: memoryview, seen: Callable[[Any], None] | None = None) -> None:
    """Read until ``buffer`` is full. Raises ``BadFileError`` if the file ends before."""
    rest = buffer
    while rest:
        count = file.readinto(rest)
        if not count:
            raise BadFileError(f"it ends {len(rest)} bytes too early")
        rest = rest[count:]
    if seen is not None:
        seen(buffer)


def _take(file: Readable, size: int, seen: Callable[[Any], None]) -> bytearray:
    buffer = bytearray(size)
    with memoryview(buffer) as view:  # while there is one, the buffer could not be emptied
        fill(file, view, seen)
    return buffer


def _slot(key: str, entry: dict[str, Any]) -> Slot:
    shape = tuple(_count(each) for each in entry["shape"])
    begin, end = (_count(each) for each in entry["data_offsets"])
    dtype = entry["dtype"]
    if dtype not in DTYPES:
        raise BadFileError(f"{reprlib.repr(dtype)} is no dtype")
    if end - begin != volume(shape) * DTYPES[dtype].itemsize:
        raise BadFileError(f"{reprlib.repr(key)} has {end - begin} bytes for its shape {shape}")
    return Slot(key, dtype, shape, begin, end)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadFileError(f"{reprlib.repr(value)} is not a count")
    return value
