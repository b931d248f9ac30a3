"""Moving a batch, whatever it is made of, to a device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
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
    return _moved(batch, device, device.type != "cpu")


def _moved(value: Any, device: torch.device, non_blocking: bool) -> Any:  # noqa: FBT001 - private
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=non_blocking)
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if callable(getattr(type(value), "to", None)):
        moved = value.to(device)
        return value if moved is None else moved  # some move in place and return nothing
    return _moved_container(value, device, non_blocking)


def _moved_container(value: Any, device: torch.device, non_blocking: bool) -> Any:  # noqa: FBT001
    if isinstance(value, Mapping):
        return _moved_mapping(value, device, non_blocking)
    if isinstance(value, (list, tuple)):
        return _moved_sequence(value, device, non_blocking)
    if is_dataclass(value) and not isinstance(value, type):
        return _moved_dataclass(value, device, non_blocking)
    return value


def _moved_mapping(value: Mapping[Any, Any], device: torch.device, non_blocking: bool) -> Any:  # noqa: FBT001
    moved = {key: _moved(item, device, non_blocking) for key, item in value.items()}
    if all(moved[key] is item for key, item in value.items()):
        return value
    if type(value) is dict or not isinstance(value, MutableMapping):
        return moved
    result = copy.copy(value)  # keeps the order, default factory and attributes of its class
    result.update(moved)
    return result


def _moved_sequence(
    value: list[Any] | tuple[Any, ...],
    device: torch.device,
    non_blocking: bool,  # noqa: FBT001
) -> Any:
    moved = [_moved(item, device, non_blocking) for item in value]
    if all(new is old for new, old in zip(moved, value, strict=True)):
        return value
    if isinstance(value, list):
        result = copy.copy(value)
        result[:] = moved
        return result
    if hasattr(value, "_make"):
        return value._make(moved)
    return type(value)(moved)


def _moved_dataclass(value: Any, device: torch.device, non_blocking: bool) -> Any:  # noqa: FBT001
    result = value
    for field in fields(value):
        old = getattr(value, field.name, None)
        new = _moved(old, device, non_blocking)
        if new is old:
            continue
        if result is value:
            result = copy.copy(value)
        object.__setattr__(result, field.name, new)  # frozen ones, too
    return result
