"""What is in a checkpoint, place by place, and where two differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from drivetrain_interfaces.checkpoint import Difference
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit.codecs import TAG, dtype_name, join

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SEQUENCES: Final = ("tuple", "set", "frozenset", "torch.Size")
_LONGEST: Final = 60
# Lists of more plain values are one value: the places of all would take far more than the file.
_MOST_ITEMS: Final = 1000
_MOST_PLACES: Final = 1 << 26  # bytes of all places
_OF_A_PLACE: Final = 200


@dataclass(frozen=True, slots=True)
class Content:
    """A checkpoint as it is compared.

    Attributes:
        state: The tree as JSON values.
        tensors: By name: tensors, or what has ``shape``, ``dtype`` and ``read()``.
    """

    state: Any
    tensors: Mapping[str, Any]

    def flat(self) -> dict[str, Any]:
        """Plain values and tensors by place."""
        return _flattened(self.state, self.tensors)


def values_of(state: Any) -> dict[str, Any]:
    """Everything in a tree but its tensors, by place; a long list of plain values is one value."""
    found = _flattened(state, {})
    return {place: value for place, value in found.items() if value is not _ELSEWHERE}


def differences(first: Content, second: Content) -> list[Difference]:
    """Where two differ, in the order of places."""
    one, other = first.flat(), second.flat()
    found = []
    for place in sorted(one.keys() | other.keys()):
        if place not in other:
            found.append(Difference(place, "first only", _shown(one[place])))
        elif place not in one:
            found.append(Difference(place, "second only", _shown(other[place])))
        elif (difference := _difference(place, one[place], other[place])) is not None:
            found.append(difference)
    return found


_ELSEWHERE: Final = object()


def _flattened(state: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    room = _MOST_PLACES
    try:
        for place, value in _flat(state, "", tensors):
            found[place] = value
            room -= len(place) + _OF_A_PLACE
            if room < 0:
                raise CheckpointError(
                    f"A checkpoint was to be looked at place by place, and the first {len(found)} "
                    f"have filled the {_MOST_PLACES} bytes that there are for them.",
                    "Load it instead, and look at what you want to know.",
                )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "A checkpoint was to be looked at, and holds a value that is no codec's.",
            "Use another checkpoint.",
        ) from error
    return found


def _flat(value: Any, where: str, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and TAG in value:
        name, inner = value[TAG], value.get("value")
        if name == "tensor":
            yield where, tensors.get(value["name"], _ELSEWHERE)
        elif isinstance(inner, list) and name in _SEQUENCES:
            yield from _flat(inner, where, tensors)
        elif isinstance(inner, list) and name == "dict":
            for key, item in inner:
                shown = key if isinstance(key, (str, int)) else json.dumps(key)
                yield from _flat(item, join(where, shown), tensors)
        elif isinstance(inner, dict):
            yield from _flat(inner, where, tensors)
        else:
            yield where, f"{name} {inner if isinstance(inner, str) else json.dumps(inner)}"
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, join(where, key), tensors)
    elif isinstance(value, list) and value and not _is_long(value):
        for number, item in enumerate(value):
            yield from _flat(item, join(where, number), tensors)
    else:
        yield where, value


def _is_long(value: list[Any]) -> bool:
    return len(value) > _MOST_ITEMS and not any(isinstance(each, (list, dict)) for each in value)


def _difference(place: str, one: Any, other: Any) -> Difference | None:
    if not (hasattr(one, "shape") and hasattr(other, "shape")):
        if type(one) is type(other) and one == other:
            return None
        return Difference(place, "value", f"{_shown(one)} and {_shown(other)}")
    if one.dtype != other.dtype:
        return Difference(place, "dtype", f"{dtype_name(one.dtype)} and {dtype_name(other.dtype)}")
    if tuple(one.shape) != tuple(other.shape):
        return Difference(place, "shape", f"{tuple(one.shape)} and {tuple(other.shape)}")
    first, second = _read(one), _read(other)
    if torch.equal(_bytes(first), _bytes(second)):
        return None
    return Difference(place, "value", _distance(first, second))


def _distance(first: torch.Tensor, second: torch.Tensor) -> str:
    wide = torch.complex128 if first.is_complex() else torch.float64
    one, other = first.to(wide), second.to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    changed = int((~same).sum())
    distance = (one - other).abs().nan_to_num(nan=float("inf"))[~same]
    largest = float(distance.max()) if changed else 0.0
    return f"{changed} of {first.numel()} items, by up to {largest:g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().resolve_neg().cpu()
    found: torch.Tensor = value.read()
    return found


def _shown(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{dtype_name(value.dtype)} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
