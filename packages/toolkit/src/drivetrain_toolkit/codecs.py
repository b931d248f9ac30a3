"""From Python values to JSON and back, without ever running code that a file names.

Every value is either JSON itself or a mapping with the key ``"$"`` that names a codec. Decoding
looks the name up in a table of this process; it imports nothing and calls nothing else.

Built in: None, bool, int, float with inf and nan, str, list, tuple, set, frozenset, dict with any
keys, OrderedDict, Counter, deque, bytes, bytearray, complex, paths, date, time, datetime and
timedelta, numpy scalars and arrays, OmegaConf's containers, and torch's dtype, device, Size and
tensors. Own classes are added with ``register``.
"""

from __future__ import annotations

import base64
import ctypes
import re
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from drivetrain_interfaces.checkpoint import Shard
from drivetrain_interfaces.errors import CheckpointError, ConfigurationError

#: The key that marks a mapping as an encoded value.
TAG: Final = "$"
_TENSOR: Final = "tensor"
_LARGEST_JSON_INT: Final = 2**63
#: From so many bytes on, arrays and bytes are kept as tensors: base64 takes several times them.
_LARGE_BYTES: Final = 1 << 16
#: Places are made for every value: long ones would take far more memory than a file has.
_LONGEST_PLACE: Final = 1 << 12

# What the two directions work with: a value, and where it is in the tree.
Encoder = Callable[[Any, str], Any]
# Takes a tensor, or this process's part of one, and its place; returns the name to find it by.
Keep = Callable[[Any, str], str]


@dataclass(frozen=True, slots=True)
class Codec:
    """How values of one class become other values, and come back.

    Attributes:
        name: What files call it. Once used, never give it another meaning.
        kind: The class; subclasses are not meant.
        encode: From a value to one that other codecs know. It may contain tensors.
        decode: Back. What it raises becomes a ``CheckpointError``.
    """

    name: str
    kind: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class Codecs:
    """The codecs of one process, built in and registered."""

    def __init__(self) -> None:
        self._by_kind: dict[type, Codec] = {}
        self._by_name: dict[str, Codec] = {}
        for codec in (*_plain_codecs(), *_torch_codecs()):
            self._add(codec)

    def register(
        self,
        kind: type,
        *,
        name: str | None = None,
        encode: Callable[[Any], Any] | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> None:
        """Let checkpoints hold values of ``kind``.

        Args:
            kind: An enum or a dataclass, which need nothing else, or any class.
            name: What files call it; by default the class's own name.
            encode: From a value to plain values and tensors.
            decode: From those back to a value.

        Raises:
            ConfigurationError: The class needs functions, or the name is taken.
        """
        name = name or kind.__name__
        if encode is None or decode is None:
            encode, decode = _default_functions(kind)
        taken = self._by_name.get(name)
        other = taken is not None and taken.kind is not kind
        if other or name == _TENSOR or name in _LIBRARIES:
            raise ConfigurationError(
                f"A codec for {kind.__qualname__} was to be registered as {name!r}, which is the "
                "name of another codec.",
                "Pass another name=.",
            )
        self._add(Codec(name, kind, encode, decode))

    @property
    def names(self) -> frozenset[str]:
        """What files call the codecs that this process knows."""
        return frozenset(self._by_name) | frozenset(_LIBRARIES)

    def encode(self, value: Any, keep: Keep) -> Any:
        """A JSON value for ``value``.

        Args:
            value: A tree.
            keep: Called with each tensor and where it is in the tree, such as
                ``"model/layer.weight"``; returns the name to find it by.

        Raises:
            CheckpointError: Some part has no codec, or contains itself; says where.
        """
        try:
            return _Encoding(self._by_kind, keep).encode(value, "")
        except RecursionError as error:
            raise CheckpointError(
                "A checkpoint was to hold a tree that is nested too deeply to be written.",
                "Save a flatter tree, and look for a codec that returns its own class.",
            ) from error

    def decode(self, value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The tree again, with its tensors taken from ``tensors``.

        Raises:
            CheckpointError: A codec is not registered here, or does not accept its value.
        """
        return _Decoding(self._by_name, tensors).decode(value, "")

    def _add(self, codec: Codec) -> None:
        self._by_kind[codec.kind] = codec
        self._by_name[codec.name] = codec


class _Encoding:
    """One tree on its way to JSON."""

    def __init__(self, codecs: Mapping[type, Codec], keep: Keep) -> None:
        self._codecs = codecs
        self._keep = keep
        self._above: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int and abs(value) < _LARGEST_JSON_INT:
            return value
        if kind is float and value - value == 0.0:  # finite: inf - inf and nan - nan are nan
            return value
        if isinstance(value, torch.Tensor) or kind is Shard:
            return {TAG: _TENSOR, "name": self._keep(value, where)}
        if id(value) in self._above:
            raise CheckpointError(
                f"A checkpoint was to hold {place(where)}, which contains itself.",
                "Save a tree without cycles.",
            )
        self._above.add(id(value))
        try:
            return self._encode_container(value, kind, where)
        finally:
            self._above.discard(id(value))

    def _encode_container(self, value: Any, kind: type, where: str) -> Any:
        if kind is list:
            return [self.encode(item, join(where, n)) for n, item in enumerate(value)]
        if kind in (dict, MappingProxyType):
            return self._encode_mapping(value, where)
        codec = self._codecs.get(kind) or _library_codec(kind) or _path_codec(value)
        if codec is None:
            raise _no_codec(value, where)
        try:
            inner = codec.encode(value)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"A checkpoint was to hold {place(where)}, and the codec {codec.name!r} could not "
                f"encode it: {type(error).__name__}: {error}.",
                "Correct the value or the codec.",
            ) from error
        return {TAG: codec.name, "value": self.encode(inner, where)}

    def _encode_mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: self.encode(item, join(where, key)) for key, item in value.items()}
        pairs = [
            [self.encode(key, where), self.encode(item, join(where, key))]
            for key, item in value.items()
        ]
        return {TAG: "dict", "value": pairs}


class _Decoding:
    """One tree on its way back."""

    def __init__(self, codecs: Mapping[str, Codec], tensors: Mapping[str, torch.Tensor]) -> None:
        self._codecs = codecs
        self._tensors = tensors

    def decode(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [self.decode(item, join(where, n)) for n, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if TAG not in value:
            return {key: self.decode(item, join(where, key)) for key, item in value.items()}
        name = value[TAG]
        if name == _TENSOR:
            return self._tensor(value.get("name"), where)
        codec = None
        if isinstance(name, str):
            codec = self._codecs.get(name) or _LIBRARIES.get(name)
        if codec is None:
            raise CheckpointError(
                f"The checkpoint holds {place(where)} in the codec {name!r}, and none of that name "
                "is registered.",
                "Import or register what wrote it before loading: "
                "drivetrain_toolkit.codecs.register(TheClass).",
            )
        try:
            return codec.decode(self.decode(value["value"], where))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint holds {place(where)} in the codec {name!r}, which could not "
                f"decode it: {type(error).__name__}: {error}.",
                "Use the version of the class that wrote it.",
            ) from error

    def _tensor(self, name: Any, where: str) -> torch.Tensor:
        if not isinstance(name, str) or name not in self._tensors:
            raise CheckpointError(
                f"The checkpoint holds {place(where)} as the tensor {name!r}, which it lacks.",
                "Use another checkpoint; this one is damaged.",
            )
        return self._tensors[name]


def place(where: str) -> str:
    """How messages call a part of the tree."""
    return f"a value at {where!r}" if where else "a value"


def join(where: str, key: object) -> str:
    """The place of ``key`` below ``where``; slashes inside a key stay distinguishable.

    Raises:
        CheckpointError: It is longer than any place may be.
    """
    part = str(key).replace("~", "~0").replace("/", "~1")
    found = f"{where}/{part}" if where else part
    if len(found) > _LONGEST_PLACE:
        raise CheckpointError(
            f"A checkpoint was to hold a value at a place of {len(found)} characters that begins "
            f"with {found[:40]!r}; {_LONGEST_PLACE} are the most.",
            "Use shorter keys, or a flatter tree.",
        )
    return found


def _no_codec(value: Any, where: str) -> CheckpointError:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    register = f"drivetrain_toolkit.codecs.register({kind.__name__}"
    simple = is_dataclass(value) or isinstance(value, Enum)
    return CheckpointError(
        f"A checkpoint was to hold {place(where)} of {name}, which has no codec.",
        "Save plain values instead, or call "
        + (f"{register})." if simple else f"{register}, encode=…, decode=…)."),
    )


def _default_functions(kind: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if issubclass(kind, Enum):
        return (lambda value: value.name), (lambda name: kind[name])
    if is_dataclass(kind):
        names = [item.name for item in fields(kind)]
        return (
            lambda value: {name: getattr(value, name) for name in names},
            lambda values: _restored(kind, values),
        )
    raise ConfigurationError(
        f"A codec for {kind.__qualname__} was to be registered without functions, and it is "
        "neither an enum nor a dataclass.",
        "Pass encode= and decode=.",
    )


def _restored(kind: type, values: Mapping[str, Any]) -> Any:
    known = {item.name for item in fields(kind)}
    if unknown := values.keys() - known:
        raise ValueError(f"{kind.__name__} has no fields {sorted(unknown)}")
    settable = {item.name for item in fields(kind) if item.init}
    value = kind(**{name: each for name, each in values.items() if name in settable})
    for name in values.keys() - settable:
        object.__setattr__(value, name, values[name])
    return value


def _from_kept(kept: Any) -> bytes:
    if isinstance(kept, str):
        return base64.b64decode(kept.encode("ascii"), validate=True)
    data = _bytes_kept(kept)
    return ctypes.string_at(data.data_ptr(), data.numel())


def _bytes_kept(kept: Any) -> torch.Tensor:
    """Bytes that are kept as a tensor, which may still have to be read."""
    found = kept if isinstance(kept, torch.Tensor) else kept.read()
    if found.dtype != torch.uint8:
        raise TypeError(f"its bytes are a tensor of {dtype_name(found.dtype)}")
    plain: torch.Tensor = found.contiguous().reshape(-1)
    return plain


def _to_kept(data: Any) -> Any:
    """Text, or a tensor with a copy: what the caller has may change while it is being written."""
    if len(data) < _LARGE_BYTES:
        return base64.b64encode(data).decode("ascii")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _aware(value: datetime | time) -> str:
    if value.tzinfo is not None and type(value.tzinfo) is not timezone:
        raise ValueError(f"its time zone is a {type(value.tzinfo).__name__}, not a fixed offset")
    return value.isoformat()


_PATH: Final = Codec("path", Path, str, Path)


def _plain_codecs() -> tuple[Codec, ...]:
    return (
        Codec("int", int, hex, lambda text: int(text, 16)),
        # The eight bytes, so that a nan keeps its payload.
        Codec(
            "float",
            float,
            lambda value: struct.pack(">d", value).hex(),
            lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
        ),
        Codec(
            "complex",
            complex,
            lambda value: [value.real, value.imag],
            lambda parts: complex(*parts),
        ),
        Codec("dict", dict, list, dict),
        Codec("tuple", tuple, list, tuple),
        Codec("set", set, _in_order, set),
        Codec("frozenset", frozenset, _in_order, frozenset),
        Codec("ordered_dict", OrderedDict, dict, OrderedDict),
        Codec("counter", Counter, dict, Counter),
        Codec(
            "deque",
            deque,
            lambda value: [list(value), value.maxlen],
            lambda parts: deque(*parts),
        ),
        Codec("bytes", bytes, _to_kept, _from_kept),
        Codec("bytearray", bytearray, _to_kept, lambda kept: bytearray(_from_kept(kept))),
        _PATH,
        Codec("date", date, date.isoformat, date.fromisoformat),
        Codec("time", time, _aware, time.fromisoformat),
        Codec("datetime", datetime, _aware, datetime.fromisoformat),
        Codec(
            "timedelta",
            timedelta,
            lambda value: [value.days, value.seconds, value.microseconds],
            lambda parts: timedelta(*parts),
        ),
    )


def _in_order(values: Any) -> list[Any]:
    """The members in an order that does not change from run to run, as hashes of strings do."""
    return sorted(values, key=lambda each: (type(each).__name__, repr(each)))


def _path_codec(value: Any) -> Codec | None:
    return _PATH if isinstance(value, Path) else None  # PosixPath or WindowsPath


def _torch_codecs() -> tuple[Codec, ...]:
    return (
        Codec("torch.dtype", torch.dtype, dtype_name, dtype_named),
        Codec("torch.device", torch.device, str, torch.device),
        Codec("torch.Size", torch.Size, list, torch.Size),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """``torch.float32`` for ``"float32"``. Raises ``ValueError`` for anything but a dtype."""
    if name not in _DTYPES:
        raise ValueError(f"{name[:40]!r} is not a dtype of torch {torch.__version__}")
    return _DTYPES[name]


# A table, because asking torch for a name that a file gives could import a module.
_DTYPES: Final = {
    dtype_name(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)
}


def _library_codec(kind: type) -> Codec | None:
    """A codec for classes of other libraries, looked for without importing one."""
    home = kind.__module__.partition(".")[0]
    if home == "omegaconf":
        return _LIBRARIES.get(f"omegaconf.{kind.__name__}")
    if home != "numpy":
        return None
    import numpy as np

    if kind is np.ndarray:
        return _LIBRARIES["numpy.ndarray"]
    return _LIBRARIES["numpy.scalar"] if issubclass(kind, np.generic) else None


def _encode_array(value: Any) -> dict[str, Any]:
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind not in "biufcSUmM":
        raise ValueError(f"arrays of dtype {array.dtype} are not plain data")
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "data": _to_kept(np.ascontiguousarray(array).reshape(-1).view(np.uint8)),
    }


def _decode_array(parts: Mapping[str, Any]) -> Any:
    import numpy as np

    name = str(parts["dtype"])
    if not _ARRAY_DTYPE.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is not a dtype of plain data")
    shape = [int(each) for each in parts["shape"]]
    if any(each < 0 for each in shape):
        raise ValueError(f"an array cannot have the shape {shape}")
    kept = parts["data"]
    if isinstance(kept, str):
        return np.frombuffer(_from_kept(kept), np.dtype(name)).reshape(shape).copy()
    return _bytes_kept(kept).numpy().view(np.dtype(name)).reshape(shape)  # not copied again


def _encode_config(value: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    flags = {name: value._get_node_flag(name) for name in _CONFIG_FLAGS}  # noqa: SLF001 - no other way
    # Interpolations stay as they are written.
    return {"value": OmegaConf.to_container(value, resolve=False), "flags": flags}


def _decode_config(parts: Mapping[str, Any]) -> Any:
    from omegaconf import OmegaConf

    if not isinstance(parts["value"], (dict, list)):  # text would be read as YAML
        raise TypeError(f"a {type(parts['value']).__name__} is no configuration")
    config = OmegaConf.create(parts["value"])
    for name in _CONFIG_FLAGS:
        if parts["flags"][name] is not None:
            config._set_flag(name, bool(parts["flags"][name]))  # noqa: SLF001 - no other way
    return config


_CONFIG_FLAGS: Final = ("readonly", "struct")
_ARRAY_DTYPE: Final = re.compile(r"[<>|=]?[biufcSUmM][0-9]{0,9}(\[[0-9]{0,9}[a-zA-Z]{1,2}\])?")
_LIBRARIES: Final = {
    "omegaconf.DictConfig": Codec("omegaconf.DictConfig", object, _encode_config, _decode_config),
    "omegaconf.ListConfig": Codec("omegaconf.ListConfig", object, _encode_config, _decode_config),
    "numpy.ndarray": Codec("numpy.ndarray", object, _encode_array, _decode_array),
    "numpy.scalar": Codec(
        "numpy.scalar", object, _encode_array, lambda parts: _decode_array(parts)[()]
    ),
}

#: The codecs that a checkpoint IO uses unless it is given others.
CODECS: Final = Codecs()
#: Let checkpoints hold values of a class: ``register(MyEnum)``, ``register(MyDataclass)``.
register: Final = CODECS.register
