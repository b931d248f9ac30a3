"""Tensors in a file of the safetensors format: a JSON header, then bytes. It cannot carry code.

Written here rather than by the library, so that bytes go from the tensor to the disk without a
copy of everything in between, are hashed on their way, and a full disk is an ``OSError`` with its
number. Read by the library, whose checks of foreign headers are well tested.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_name, dtype_named, place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
_HEADER_ALIGNMENT: Final = 8
_CHUNK: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a file says about a tensor: the name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorShelf:
    """Collects the tensors of a tree under unique names; tensors that are one are kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._seen: dict[tuple[Any, ...], str] = {}
        self._originals: list[torch.Tensor] = []

    def keep(self, tensor: torch.Tensor, where: str) -> str:
        """Stage a tensor on the host, contiguous and without its graph; returns its name.

        Raises:
            CheckpointError: It has no plain bytes: sparse, quantized, nested, meta, or a subclass.
        """
        refuse_what_has_no_bytes(tensor, where)
        mark = _identity(tensor)
        if mark in self._seen:
            return self._seen[mark]
        name, number = where, 1
        while name in self.tensors or name == "__metadata__":
            number += 1
            name = f"{where}#{number}"
        self.tensors[name] = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        self._seen[mark] = name
        self._originals.append(tensor)  # alive, so that no address is used twice
        return name

    def facts(self) -> dict[str, TensorFacts]:
        """What the manifest says about each tensor."""
        return {
            name: TensorFacts(dtype_name(each.dtype), tuple(each.shape))
            for name, each in self.tensors.items()
        }


def refuse_what_has_no_bytes(tensor: torch.Tensor, where: str) -> None:
    """Raises ``CheckpointError`` for a tensor that is more, or less, than an array of numbers."""
    kind = type(tensor)
    problem = ""
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        problem = f"a {kind.__module__}.{kind.__qualname__}"
    elif tensor.layout != torch.strided or tensor.is_nested:
        problem = f"a tensor of layout {tensor.layout}"
    elif tensor.is_quantized:
        problem = "a quantized tensor"
    elif tensor.is_meta:
        problem = "a meta tensor, without data"
    if problem:
        raise CheckpointError(
            f"A checkpoint was to hold {place(where)}, which is {problem}.",
            "Convert it to a plain dense tensor before saving.",
        )


def write_tensors(tensors: Mapping[str, torch.Tensor], write: Callable[[Any], None]) -> None:
    """Hand the bytes of a safetensors file to ``write``, piece by piece.

    Args:
        tensors: Contiguous tensors on the host. A dtype that the format lacks is stored as bytes.
        write: Takes anything with the buffer interface.
    """
    # Large items first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        known = tensor.dtype in _NAMES
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES.get(tensor.dtype, "U8"),
            "shape": list(tensor.shape) if known else [end - offset],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    write(len(text).to_bytes(8, "little") + text)
    for name in order:
        _write_bytes(tensors[name], write)


def _write_bytes(tensor: torch.Tensor, write: Callable[[Any], None]) -> None:
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return
    view = memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
    for start in range(0, size, _CHUNK):
        write(view[start : start + _CHUNK])


def read_tensors(path: str, facts: Mapping[str, TensorFacts]) -> dict[str, torch.Tensor]:
    """The tensors of a file, on the host, each with memory of its own.

    Args:
        path: A file that ``write_tensors`` filled.
        facts: What the manifest says must be in it.

    Raises:
        CheckpointError: The file is malformed, or holds other tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path, device="cpu")
        # Copied: the library may map the file, and what is loaded must not change with the file.
        tensors = {name: _as_saved(found.pop(name), facts[name]) for name in sorted(facts)}
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The file {path!r} was to be read as tensors, and is not as its manifest says: "
            f"{type(error).__name__}: {error}.",
            "Use another checkpoint.",
        ) from error
    if found:
        raise CheckpointError(
            f"The file {path!r} holds tensors that its manifest does not name: {sorted(found)}.",
            "Use another checkpoint.",
        )
    return tensors


def _as_saved(tensor: torch.Tensor, facts: TensorFacts) -> torch.Tensor:
    dtype = dtype_named(facts.dtype)
    if dtype not in _NAMES:
        tensor = tensor.clone().view(dtype).reshape(facts.shape)
    if tensor.dtype != dtype or tuple(tensor.shape) != facts.shape:
        raise ValueError(
            f"a tensor is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}, "
            f"not {facts.dtype} {facts.shape}"
        )
    return tensor.clone()


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers at the same place, such as tied weights."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
