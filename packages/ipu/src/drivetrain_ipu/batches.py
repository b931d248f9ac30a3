"""Batches as a program takes them: a flat list of tensors, and a plan to build the batch again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import DataError
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tree:
    """What a batch is made of.

    Lists, tuples, named tuples, mappings and dataclasses are looked into; whatever else is in them
    is a constant of the program.

    Attributes:
        tensors: In the order in which they were found.
        constants: Everything else.
        form: Containers and places, to compare with that of another batch.
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        self.constants: list[Any] = []
        self.form = self._take(value)

    def _take(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return len(self.tensors) - 1
        if isinstance(value, Mapping):
            return (_Kind(value), tuple((k, self._take(v)) for k, v in value.items()))
        if isinstance(value, (list, tuple)):
            return (_Kind(value), tuple((n, self._take(v)) for n, v in enumerate(value)))
        if is_dataclass(value) and not isinstance(value, type):
            found = tuple((f.name, self._take(getattr(value, f.name))) for f in fields(value))
            return (_Kind(value), found)
        self.constants.append(value)
        return -len(self.constants)

    def rebuilt(self, tensors: Sequence[Tensor], constants: Sequence[Any] | None = None) -> Any:
        """The same containers around other tensors.

        Args:
            tensors: As many as in ``tensors``.
            constants: In place of ``constants``; None takes those.
        """
        return self._build(self.form, tensors, self.constants if constants is None else constants)

    def _build(self, form: Any, tensors: Sequence[Tensor], constants: Sequence[Any]) -> Any:
        if isinstance(form, int):
            return tensors[form] if form >= 0 else constants[-form - 1]
        kind, items = form
        return kind.made({key: self._build(item, tensors, constants) for key, item in items})


class _Kind:
    """The class of a container, and how another one of it is made."""

    def __init__(self, sample: Any) -> None:
        self._sample = sample

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and type(self._sample) is type(other._sample)

    def __hash__(self) -> int:
        return hash(type(self._sample))

    def made(self, items: Mapping[Any, Any]) -> Any:
        sample = self._sample
        if type(sample) is dict:
            return dict(items)
        if isinstance(sample, tuple):
            values = items.values()
            return sample._make(values) if hasattr(sample, "_make") else type(sample)(values)
        result = copy.copy(sample)  # keeps what else there is of its class
        if isinstance(sample, list):
            result[:] = items.values()
        elif isinstance(sample, Mapping):
            result.update(items)
        else:
            for name, value in items.items():
                object.__setattr__(result, name, value)  # frozen ones, too
        return result


def shapes(tensors: Sequence[Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """What a program was compiled for."""
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def check_rows(tensors: Sequence[Tensor], parts: int, what: str) -> None:
    """Refuse a batch that the program cannot divide.

    Args:
        tensors: Of one batch.
        parts: Into how many the first dimension of each is divided.
        what: What makes them, for the message.

    Raises:
        DataError: A first dimension is no multiple of ``parts``, or there is none.
    """
    for tensor in tensors:
        rows = tensor.shape[0] if tensor.dim() else 1
        if rows % parts:
            raise DataError(
                f"A batch holds a tensor of shape {tuple(tensor.shape)}, whose {rows} rows {what} "
                f"cannot share: it is divided into {parts}.",
                f"Give batches whose size is a multiple of {parts}, with drop_last=True.",
            )


def joined(batches: Sequence[Sequence[Tensor]], iterations: int) -> list[Tensor]:
    """The tensors of all microbatches of a window, in the order in which a program reads them.

    It reads the device iterations one after the other, and in each one every microbatch.

    Args:
        batches: The tensors of each microbatch.
        iterations: Device iterations, which divide each microbatch.
    """
    rows = [[t if t.dim() else t.reshape(1) for t in batch] for batch in batches]
    if len(rows) == 1:
        return rows[0]
    made = []
    for parts in zip(*rows, strict=True):
        whole = torch.stack([part.reshape(iterations, -1, *part.shape[1:]) for part in parts])
        made.append(whole.transpose(0, 1).reshape(-1, *parts[0].shape[1:]).contiguous())
    return made
