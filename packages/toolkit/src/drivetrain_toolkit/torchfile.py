"""Reads files of ``torch.save`` as data: no unpickler runs, and no name in them is looked up.

Such a file is a zip archive with a pickle program and the bytes of tensors. The program is followed
here by an interpreter that knows plain containers, numbers, text, and how tensors are put together.
Any class or function that it names besides is left out, together with what it was applied to: a
``Refused`` stands in its place.
"""

from __future__ import annotations

import pickletools
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, cast

import torch
from drivetrain_interfaces.checkpoint import Refused
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_name
from drivetrain_toolkit.jsontext import ROOM
from drivetrain_toolkit.manifest import volume

if TYPE_CHECKING:
    from collections.abc import Callable

_ENCRYPTED: Final = 1
_MOST_DIMENSIONS: Final = 64
_MARK: Final = object()
# At most how many bytes a step of a program takes: the value, its places on the stack and in what
# holds it, and those in copies of that; an entry of the memo; and one of the archive's directory.
_OF_A_VALUE: Final = 64
_OF_A_CONTAINER: Final = 192
_OF_A_NOTE: Final = 160
_OF_A_RECORD: Final = 20  # for each byte there


class _ForeignError(ValueError):
    """Says in its text what is wrong with a file."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes that tensors are views of, as items of one dtype."""

    items: torch.Tensor


def read_torch_file(file: IO[bytes], size: int, path: str) -> Any:
    """What ``torch.save`` was given, with ``Refused`` in place of whatever is not plain data.

    Args:
        file: At its beginning; seekable.
        size: Its size in bytes.
        path: For messages.

    Raises:
        CheckpointError: It is damaged, or built to take more memory than its size.
    """
    try:
        limited = _Limited(file, (size // 4 + ROOM) // _OF_A_RECORD)
        with zipfile.ZipFile(cast("IO[bytes]", limited)) as archive:
            limited.longest = size
            records = _records(archive, size)
            program = archive.read(records.pop("data.pkl"))
            _check_byte_order(archive, records)
            room = len(program) + (size - len(program)) // 4 + ROOM
            tree = _Program(archive, records, room).run(program)
        _check_extent(tree, size, len(program))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _unreadable(path, f"its archive is damaged ({error})") from error
    except _ForeignError as error:
        raise _unreadable(path, str(error)) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _unreadable(path, f"its program is damaged ({type(error).__name__})") from error
    except (OverflowError, RuntimeError) as error:
        raise _unreadable(path, f"its tensors are damaged ({type(error).__name__})") from error
    return tree


def _unreadable(path: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"The file {path!r} was to be read as one of torch.save, and cannot be: {how}.",
        "Use another file, or save it again with a current torch.",
    )


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The records by name, without the folder that they are in. None takes more than it has."""
    found: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _ForeignError("a record is compressed, which torch.save never does")
        if info.flag_bits & _ENCRYPTED or name in found:
            raise _ForeignError("a record is encrypted or there twice")
        found[name] = info
        total += info.file_size
    if total > size:
        raise _ForeignError(f"its records would take {total} bytes of {size}")
    if "data.pkl" not in found:
        raise _ForeignError("it has no record data.pkl")
    return found


def _check_byte_order(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> None:
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise _ForeignError("its byte order is not little endian")


class _Limited:
    """A file of which nobody reads much at once: the directory of an archive takes many times it.

    Args:
        file: The file.
        longest: How many bytes.
    """

    def __init__(self, file: IO[bytes], longest: int) -> None:
        self._file = file
        self.longest = longest

    def read(self, size: int = -1) -> bytes:
        if size > self.longest:
            raise _ForeignError(f"the directory of its archive would have {size} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Program:
    """Follows a pickle program. What it can make is what this class makes.

    Args:
        archive: Where storages are.
        records: Its records by name.
        room: Bytes that the values of the program may take.
    """

    def __init__(
        self, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], room: int
    ) -> None:
        self._archive = archive
        self._records = records
        self._room = room
        self._storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._handlers: dict[str, Callable[[], None]] = {
            "TUPLE": lambda: self._stack.append(tuple(self._above_mark())),
            "TUPLE1": lambda: self._tuple(1),
            "TUPLE2": lambda: self._tuple(2),
            "TUPLE3": lambda: self._tuple(3),
            "SETITEM": lambda: self._set(self._two()),
            "SETITEMS": lambda: self._set(self._above_mark()),
            "APPEND": lambda: self._append([self._stack.pop()]),
            "APPENDS": lambda: self._append(self._above_mark()),
            "REDUCE": self._reduce,
            "NEWOBJ": self._new,
            "BUILD": self._build,
            "BINPERSID": self._persistent,
        }

    def run(self, program: bytes) -> Any:
        try:
            return self._followed(program)
        finally:  # what refers to itself would keep its memory until somebody looks for that
            self._handlers.clear()
            self._memo.clear()
            self._stack.clear()

    def _followed(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._follow(opcode.name, argument)
            self._room -= _STEPS.get(opcode.name, 0)
            if self._room < 0:
                raise _ForeignError("what its program makes would take far more memory than it has")
        raise _ForeignError("its program does not end")

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("PROTO", "FRAME"):
            return
        elif name == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module}.{attribute}"))
        elif name in self._handlers:
            self._handlers[name]()
        else:
            raise _ForeignError(f"its program uses {name}, which plain data does not need")

    def _above_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise _ForeignError("its program lacks a mark")
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[len(self._stack) - count :])
        if len(items) != count:
            raise _ForeignError("its program takes what is not there")
        del self._stack[len(self._stack) - count :]
        self._stack.append(items)

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        items = [(_key(key), value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)]
        if isinstance(target, Refused):
            if target.items is not None:
                target.items.update(items)
        elif type(target) in (dict, OrderedDict):
            target.update(items)
        else:
            raise _ForeignError("its program puts items into what is no mapping")

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Refused):
            return
        if type(target) is not list:
            raise _ForeignError("its program appends to what is no list")
        target.extend(items)

    def _two(self) -> list[Any]:
        value, key = self._stack.pop(), self._stack.pop()
        return [key, value]

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Refused) or type(arguments) is not tuple:
            raise _ForeignError("its program calls what is no name")
        make = _FUNCTIONS.get(function.kind)
        self._stack.append(Refused(function.kind) if make is None else make(*arguments))

    def _new(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Refused) or type(arguments) is not tuple:
            raise _ForeignError("its program makes what has no name")
        # A mapping of an unknown class, such as a dict with attributes, keeps its items.
        self._stack.append(Refused(kind.kind, None if arguments else {}))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, (Refused, OrderedDict)):
            raise _ForeignError("its program gives a state to plain data")
        del state  # attributes of a class that is not made, or a module's _metadata

    def _persistent(self) -> None:
        kind, dtype, key, *_, count = self._stack.pop()
        if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise _ForeignError("its program refers to something else than a storage")
        if key not in self._storages:
            self._storages[key] = self._storage(_storage_dtype(dtype), key, count)
        self._stack.append(self._storages[key])

    def _storage(self, dtype: torch.dtype, key: str, count: int) -> _Storage:
        info = self._records.get(f"data/{key}")
        if info is None or info.file_size != count * dtype.itemsize:
            raise _ForeignError(f"its storage {key[:40]!r} is missing or has another size")
        data = bytearray(self._archive.read(info))
        return _Storage(
            torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        )


def _named(text: str) -> Any:
    """What a program means by a name, before it is called: a dtype, or what is refused."""
    return _DTYPES.get(text) or Refused(text)


def _storage_dtype(name: Any) -> torch.dtype:
    found = _STORAGES.get(name.kind) if isinstance(name, Refused) else None
    if found is None:
        raise _ForeignError("its program names an unknown kind of storage")
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    numbers = (offset, *size, *stride)
    if any(type(each) is not int or each < 0 for each in numbers) or len(size) != len(stride):
        raise _ForeignError("a tensor has a shape or place that is no number")
    if len(size) > _MOST_DIMENSIONS or not isinstance(storage, _Storage):
        raise _ForeignError("a tensor has no storage or too many dimensions")
    items = storage.items
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if volume(size) and last >= items.numel():
        raise _ForeignError("a tensor leaves its storage")
    if not volume(size):
        return torch.empty(size, dtype=items.dtype)
    return items.as_strided(size, stride, offset)


def _typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    """Of a dtype that has no storage class: the bytes of an untyped storage, seen as one."""
    dtype = rest[2] if len(rest) > 2 else None  # noqa: PLR2004 - after gradient and hooks
    if not isinstance(dtype, torch.dtype) or not isinstance(storage, _Storage):
        raise _ForeignError("a tensor has an unknown dtype")
    data = storage.items.view(torch.uint8)
    if data.numel() % dtype.itemsize:
        raise _ForeignError("a tensor leaves its storage")
    return _tensor(_Storage(data.view(dtype)), offset, size, stride)


def _ordered(*pairs: Any) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for each in pairs for key, value in each)


def _key(key: Any) -> Any:
    """Plain keys alone: the hash of deeply nested ones would exhaust the stack."""
    parts = key if type(key) is tuple else (key,)
    if all(part is None or type(part) in (str, int, float, bool, bytes) for part in parts):
        return key
    raise _ForeignError("a mapping has a key that is not plain")


def _parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, torch.Tensor):
        raise _ForeignError("a parameter has no tensor")
    return data


def _check_extent(tree: Any, size: int, steps: int) -> None:
    """Refuse what is much more than its file once every reference is followed."""
    seen: set[tuple[Any, ...]] = set()
    total, count = 0, 0
    rest = [tree]
    while rest:
        value = rest.pop()
        count += 1
        if count > steps + 1000:  # every honest reference takes a byte of the program
            raise _ForeignError("it contains itself, or the same part very often")
        if isinstance(value, torch.Tensor):
            mark = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            total += 0 if mark in seen else value.numel() * value.element_size()
            seen.add(mark)
        elif isinstance(value, dict):
            rest.extend((*value.keys(), *value.values()))
        elif isinstance(value, (list, tuple)):
            rest.extend(value)
        elif isinstance(value, Refused) and value.items:
            rest.extend((*value.items.keys(), *value.items.values()))
        elif isinstance(value, _Storage) or value is _MARK:
            raise _ForeignError("a part of it is no data")
    if total > 2 * size:
        raise _ForeignError(f"its tensors would take {total} bytes, and it has {size}")


_VALUES: Final = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "INT", "LONG", "FLOAT", "UNICODE",
}  # fmt: skip
_MADE: Final[dict[str, Callable[[], Any]]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_STEPS: Final = {
    **dict.fromkeys((*_VALUES, "NONE", "NEWTRUE", "NEWFALSE", "MARK", "EMPTY_TUPLE"), _OF_A_VALUE),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET", "BINPERSID"), _OF_A_VALUE),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "TUPLE", "TUPLE1"), _OF_A_CONTAINER),
    **dict.fromkeys(("TUPLE2", "TUPLE3", "GLOBAL", "STACK_GLOBAL", "REDUCE"), _OF_A_CONTAINER),
    "NEWOBJ": _OF_A_CONTAINER,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"), _OF_A_NOTE),
}
_DTYPES: Final = {
    f"torch.{dtype_name(each)}": each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype)
}
_STORAGES: Final = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
    "torch.Size": lambda sizes: torch.Size([int(each) for each in sizes]),
    "torch.device": torch.device,
}
