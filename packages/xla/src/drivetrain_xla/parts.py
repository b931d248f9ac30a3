"""Tensors that are divided over devices: read part by part, and given part by part.

Copying such a tensor makes the whole of it on every device first, and one to such a tensor sends
the whole to every device (torch_xla 2.9): memory for which it was divided, and a graph for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch_xla

from drivetrain_xla import device_module

if TYPE_CHECKING:
    from torch import Tensor

_XLAC = torch_xla._XLAC  # noqa: SLF001 - torch_xla's own planners of checkpoints use it


def told(tensor: Tensor) -> str:
    """How a tensor has been told to lie on the devices; nothing if it has not."""
    spec: str = _XLAC._get_xla_sharding_spec(tensor)  # noqa: SLF001
    return spec


def divided(tensor: Tensor) -> bool:
    """Whether devices hold different parts of a tensor."""
    return tensor.device.type == device_module.NAME and told(tensor) not in {"", "{replicated}"}


def whole_on_host(tensor: Tensor) -> Tensor:
    """A divided tensor on the host, made of its parts, each read once; others as they are.

    What it holds must have been computed (``torch_xla.sync``).
    """
    if not divided(tensor):
        return tensor
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    parts = _XLAC._get_local_shards([tensor])[0]  # noqa: SLF001
    places = _XLAC._get_local_shard_replica_and_indices([tensor])[0]  # noqa: SLF001
    for (part, _device), (copy, where) in zip(parts, places, strict=True):
        if not copy:
            # Parts are of one size, so that the last ones may be longer than what is left.
            whole[tuple(where)] = part[tuple(slice(0, each.stop - each.start) for each in where)]
    return whole


def placed_like(whole: Any, wanted: Tensor) -> Any:
    """A tensor of the host divided like one that is here; as it is, if that one is not divided."""
    if not divided(wanted):
        return whole
    placed = whole.to(wanted.device)
    _XLAC._xla_mark_sharding(placed, _XLAC._get_xla_op_sharding(wanted))  # noqa: SLF001
    return placed
