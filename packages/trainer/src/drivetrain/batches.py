"""Facts about a batch, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drivetrain_interfaces import DataError


def size_of(batch: Any) -> int:
    """The number of samples: the first dimension of the first tensor or array that has one.

    Raises:
        DataError: There is no such tensor, and no list whose length could be meant.
    """
    found = _first_size(batch)
    if found is None:
        raise DataError(
            f"The number of samples in a batch of type {type(batch).__name__} cannot be told: "
            "it holds no tensor with a dimension.",
            "Pass batch_size to log, or override batch_weight in the module.",
        )
    return found


def _first_size(part: Any) -> int | None:
    shape = getattr(part, "shape", None)
    if isinstance(shape, tuple):
        return int(shape[0]) if shape else None
    items: Sequence[Any] = ()
    if isinstance(part, Mapping):
        items = list(part.values())
    elif hasattr(part, "__dataclass_fields__"):
        items = [getattr(part, name) for name in part.__dataclass_fields__]
    elif isinstance(part, Sequence) and not isinstance(part, (str, bytes)):
        items = part
    for item in items:
        size = _first_size(item)
        if size is not None:
            return size
    # A list of strings or numbers is a batch of as many samples; fields of a record are not.
    return len(items) if items and items is part else None
