"""Facts about a batch, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from drivetrain_interfaces import DataError


def size_of(batch: Any) -> int:
    """The number of samples: the first dimension of the first tensor that has one.

    Raises:
        DataError: There is no such tensor.
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
    if isinstance(part, torch.Tensor):
        return part.shape[0] if part.dim() else None
    if isinstance(part, Mapping):
        part = list(part.values())
    elif hasattr(part, "__dataclass_fields__"):
        part = [getattr(part, name) for name in part.__dataclass_fields__]
    elif isinstance(part, str) or not isinstance(part, Sequence):
        return None
    for item in part:
        size = _first_size(item)
        if size is not None:
            return size
    # A list of strings or numbers is a batch of as many samples.
    return len(part) if part else None
