"""Moving a batch, whatever it is made of, to a device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def move(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; the same object if they are there already.

    Looks into lists, tuples, named tuples, mappings and dataclasses. Anything else that has a
    ``to`` method gets ``.to(device)``; the rest stays as it is. The caller's batch is not changed.

    Args:
        batch: What a loader yields.
        device: Where it goes, with an index if the device family has one.
    """
    # The usual batch, already in place, costs a few attribute reads: this runs every step.
    kind = type(batch)
    if kind is Tensor:
        if batch.device == device:
            return batch
    elif kind is tuple or kind is list:
        for item in batch:
            if type(item) is not Tensor or item.device != device:
                break
        else:
            return batch
    # A copy to the host that does not wait would hand out memory that is still being written.
    return mapped(batch, _Mover(device, non_blocking=device.type != "cpu"))


class _Mover:
    """What moves one tensor, or whatever else says how it is moved."""

    __slots__ = ("_device", "_non_blocking")

    def __init__(self, device: torch.device, *, non_blocking: bool) -> None:
        self._device = device
        self._non_blocking = non_blocking

    def __call__(self, value: Any) -> Any:
        device = self._device
        if isinstance(value, Tensor):
            if value.device == device:
                return value
            return value.to(device, non_blocking=self._non_blocking)
        moved = value.to(device)
        return value if moved is None else moved  # some move in place and return nothing


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """The batch with ``leaf`` of each tensor in it, and of each object that has a ``to`` method.

    Looks where ``move`` does. Parts of which nothing changed stay the same objects.

    Args:
        value: A batch, or a part of one.
        leaf: Called with each of them; returns what takes its place.
    """
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, Tensor) or callable(getattr(type(value), "to", None)):
        return leaf(value)
    if isinstance(value, Mapping):
        return _mapped_mapping(value, leaf)
    if isinstance(value, (list, tuple)):
        return _mapped_sequence(value, leaf)
    if is_dataclass(value) and not isinstance(value, type):
        return _mapped_dataclass(value, leaf)
    return value


def _mapped_mapping(value: Mapping[Any, Any], leaf: Callable[[Any], Any]) -> Any:
    changed = {key: mapped(item, leaf) for key, item in value.items()}
    if all(changed[key] is item for key, item in value.items()):
        return value
    if type(value) is dict or not isinstance(value, MutableMapping):
        return changed
    result = copy.copy(value)  # keeps the order, default factory and attributes of its class
    result.update(changed)
    return result


def _mapped_sequence(value: list[Any] | tuple[Any, ...], leaf: Callable[[Any], Any]) -> Any:
    changed = [mapped(item, leaf) for item in value]
    if all(new is old for new, old in zip(changed, value, strict=True)):
        return value
    if isinstance(value, list):
        result = copy.copy(value)
        result[:] = changed
        return result
    if hasattr(value, "_make"):
        return value._make(changed)
    return type(value)(changed)


def _mapped_dataclass(value: Any, leaf: Callable[[Any], Any]) -> Any:
    result = value
    for field in fields(value):
        old = getattr(value, field.name, None)
        new = mapped(old, leaf)
        if new is old:
            continue
        if result is value:
            result = copy.copy(value)
        object.__setattr__(result, field.name, new)  # frozen ones, too
    return result
