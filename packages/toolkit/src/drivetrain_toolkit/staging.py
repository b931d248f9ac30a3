"""Tensors on their way to files: named, on the host, each once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces.checkpoint import Shard
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import dtype_name, place

if TYPE_CHECKING:
    from collections.abc import Iterable


class TensorShelf:
    """Collects the tensors of a tree under unique names; tensors that are one are kept once.

    Args:
        copy: Whether to copy also what is on the host already, because it is going to change.
    """

    def __init__(self, *, copy: bool = False) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.shards: dict[str, Shard] = {}
        self._copy = copy
        self._seen: dict[tuple[Any, ...], str] = {}
        self._originals: list[torch.Tensor] = []

    def keep(self, value: torch.Tensor | Shard, where: str) -> str:
        """Stage a tensor on the host, contiguous and without its graph; returns its name.

        Raises:
            CheckpointError: It has no plain bytes: sparse, quantized, nested, meta, or a subclass.
        """
        if isinstance(value, Shard):
            return self._keep_shard(value, where)
        refuse_what_has_no_bytes(value, where)
        mark = _identity(value)
        if mark in self._seen:
            return self._seen[mark]
        name = self._free(where)
        self.tensors[name] = self._staged(value)
        self._seen[mark] = name
        self._originals.append(value)  # alive, so that no address is used twice
        return name

    def forget_originals(self) -> None:
        """Let go of what was staged, when no more tensors come."""
        self._originals.clear()
        self._seen.clear()

    def _keep_shard(self, shard: Shard, where: str) -> str:
        refuse_what_has_no_bytes(shard.data, where)
        inside = len(shard.start) == len(shard.shape) == shard.data.dim() and all(
            0 <= start <= start + size <= whole
            for start, size, whole in zip(shard.start, shard.data.shape, shard.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"A checkpoint was to hold {place(where)}, a shard of shape "
                f"{tuple(shard.data.shape)} at {shard.start}, which leaves the whole of "
                f"{shard.shape}.",
                "Correct where it begins.",
            )
        # A tied parameter is one tensor with several names in the tree, and so are its shards.
        mark = (*_identity(shard.data), shard.start, shard.shape)
        if mark in self._seen:
            return self._seen[mark]
        name = self._free(where)
        self.shards[name] = Shard(self._staged(shard.data), shard.start, shard.shape)
        self._seen[mark] = name
        self._originals.append(shard.data)
        return name

    def _free(self, where: str) -> str:
        name, number = where, 1
        while name in self.tensors or name in self.shards or name == "__metadata__":
            number += 1
            name = f"{where}#{number}"
        return name

    def _staged(self, tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.detach().resolve_conj().resolve_neg()
        if not self._copy or plain.data_ptr() != tensor.data_ptr():
            return plain.cpu().contiguous()
        return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


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


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """How much memory tensors take."""
    return sum(each.numel() * each.element_size() for each in tensors)


def described(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """The name of its dtype, and its shape."""
    return dtype_name(tensor.dtype), tuple(tensor.shape)


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
