"""Optimizers of which each rank updates its own parameters: their steps and states."""

from __future__ import annotations

import pickle
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from drivetrain_interfaces import ModelState

from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from drivetrain_interfaces import Collectives, Precision, StrategyContext
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from drivetrain_toolkit.steps import Update


class DividedOptimizer(Protocol):
    """An optimizer whose parameters are dealt out to ranks."""

    @property
    def optimizer(self) -> Optimizer:
        """The user's, with state for this rank's parameters only."""
        ...

    def owner(self, parameter: Tensor) -> int:
        """The rank that updates a parameter."""
        ...

    def owned(self) -> Sequence[Tensor]:
        """The parameters that this rank updates."""
        ...

    def step(self) -> None:
        """Update this rank's parameters and exchange all."""
        ...


class _Stepped:
    """The user's optimizer with a step that is the divided one, for a precision that calls it."""

    def __init__(self, divided: DividedOptimizer) -> None:
        self.step = divided.step
        self._optimizer = divided.optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def update_of(divided: Sequence[DividedOptimizer], precision: Precision) -> Update:
    """What updates instead of ``precision.step``: the same, with divided steps."""
    stepped = tuple(cast("Optimizer", _Stepped(each)) for each in divided)
    return partial(_update, precision.step, stepped)


def _update(
    step: Update,
    stepped: Sequence[Optimizer],
    _optimizers: Sequence[Optimizer],
    prepare: Callable[[], None],
) -> bool:
    return step(stepped, prepare)


def gather_state(
    divided: Sequence[DividedOptimizer], module: nn.Module, context: StrategyContext
) -> ModelState:
    """The whole state on rank 0; the others help, and return an empty one."""
    rank = context.world.rank
    return ModelState(
        module=gather_module(module) if context.world.is_main else {},
        optimizers=[
            gather_owned(each.optimizer, module, each.owner, context.collectives, rank)
            for each in divided
        ],
        precision=context.precision.state_dict(),
    )


def own_state(
    divided: Sequence[DividedOptimizer], module: nn.Module, precision: Precision
) -> ModelState:
    """The module, and the optimizer states that this rank has; nothing is sent."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    for each in divided:
        mine = gather_optimizer(each.optimizer, module)
        for parameter in names.keys() - {id(p) for p in each.owned()}:
            mine["state"].pop(names[parameter], None)
        found.append(mine)
    return ModelState(gather_module(module), found, precision.state_dict())


def restore_state(
    divided: Sequence[DividedOptimizer],
    module: nn.Module,
    precision: Precision,
    state: ModelState,
    *,
    strict: bool,
) -> None:
    """Restore a state of any strategy and world; each rank keeps what it updates.

    Raises:
        CheckpointError: Something does not fit; names what.
    """
    restore_module(module, state.module, strict=strict)
    owned = [p for each in divided for p in each.owned()]
    mine = only_owned(state.optimizers, module, owned)
    restore_optimizers([each.optimizer for each in divided], module, mine, strict=strict)
    precision.load_state_dict(state.precision)


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
