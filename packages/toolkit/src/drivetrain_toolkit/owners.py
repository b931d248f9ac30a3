"""State that several ranks have, each of its own parameters: bringing it together on rank 0."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_toolkit.state import gather_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from drivetrain_interfaces import Collectives
    from torch import Tensor, nn
    from torch.optim import Optimizer


def gather_owned(
    optimizer: Optimizer,
    module: nn.Module,
    owner_of: Callable[[Tensor], int],
    collectives: Collectives,
    rank: int,
) -> dict[str, Any]:
    """An optimizer's state on rank 0: what it lacks, its owner sends, tensor by tensor.

    Args:
        optimizer: Holds state for this rank's parameters.
        module: Where parameters have their names.
        owner_of: The rank that has a parameter's state.
        collectives: Communication.
        rank: This rank; others than 0 get an empty state.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    mine = gather_optimizer(optimizer, module)
    whole: dict[str, Any] = {k: v for k, v in mine["state"].items() if k not in names.values()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name, owner = names[id(parameter)], owner_of(parameter)
            found = mine["state"].get(name) if owner == rank else None
            kept = _sent(found, owner, collectives, here=owner == rank)
            if kept is not None:
                whole[name] = kept
    return {**mine, "state": whole} if rank == 0 else {}


def only_owned(
    saved: Sequence[Mapping[str, Any]], module: nn.Module, owned: Iterable[Tensor]
) -> list[dict[str, Any]]:
    """States of optimizers without what belongs to parameters of other ranks.

    Args:
        saved: Whole states, by the names of parameters.
        module: Where parameters have their names; a shared one has several.
        owned: This rank's parameters.
    """
    mine = {id(p) for p in owned}
    named = dict(module.named_parameters(remove_duplicate=False))
    others = {name for name, p in named.items() if id(p) not in mine}
    return [
        {
            **each,
            "state": {name: kept for name, kept in each["state"].items() if name not in others},
        }
        for each in saved
    ]


def _sent(
    found: Mapping[str, Any] | None, owner: int, collectives: Collectives, *, here: bool
) -> dict[str, Any] | None:
    """The state of one parameter, from its owner to all; None if it has none."""
    layout: Any = None
    if here and found is not None:
        layout = {
            key: (tuple(v.shape), v.dtype, None)
            if isinstance(v, torch.Tensor)
            else (None, None, pickle.dumps(v))
            for key, v in found.items()
        }
    layout = collectives.broadcast_object(layout, owner)
    if layout is None:
        return None
    made: dict[str, Any] = {}
    for key, (shape, dtype, value) in layout.items():
        if shape is None:
            made[key] = pickle.loads(value)  # noqa: S301 - from a rank of this very run
            continue
        mine = found[key] if found is not None else torch.empty(shape, dtype=dtype)
        made[key] = collectives.broadcast(mine, owner)
    return made
