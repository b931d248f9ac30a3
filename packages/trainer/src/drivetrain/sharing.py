"""Checkpoints of which each rank writes and reads its own part, where strategy and IO can."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, TypeVar

from drivetrain_interfaces import (
    CheckpointError,
    ModelState,
    SaveGroup,
    StoredTensor,
    SupportsShardedLoad,
    SupportsShardedSave,
    SupportsShardedState,
)

from drivetrain.exchange import gather_objects

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain.runtime import Stack

T = TypeVar("T")

#: What ranks hold parts of; everything else in a tree is rank 0's.
DIVIDED = ("module", "optimizers")


def writes_parts(stack: Stack) -> bool:
    """Whether each rank writes what it holds, and nothing is gathered."""
    return (
        stack.world.size > 1
        and isinstance(stack.strategy, SupportsShardedState)
        and isinstance(stack.checkpoint_io, SupportsShardedSave)
    )


def reads_parts(stack: Stack) -> bool:
    """Whether each rank reads what it is going to hold, and no more."""
    return (
        stack.world.size > 1
        and isinstance(stack.strategy, SupportsShardedState)
        and isinstance(stack.checkpoint_io, SupportsShardedLoad)
    )


def state_of(stack: Stack) -> ModelState:
    """The state of the strategy: this rank's part, or the whole on rank 0."""
    strategy = stack.strategy
    if writes_parts(stack) and isinstance(strategy, SupportsShardedState):
        return strategy.sharded_state()
    return strategy.state()


def load_into(stack: Stack, state: ModelState, *, strict: bool = True) -> None:
    """Restore a state, of stored tensors where ``reads_parts``."""
    strategy = stack.strategy
    if reads_parts(stack) and isinstance(strategy, SupportsShardedState):
        strategy.load_sharded(state, strict=strict)
    else:
        strategy.load(state, strict=strict)


def own_part(tree: Mapping[str, Any], stack: Stack) -> dict[str, Any]:
    """What this rank writes of a tree: all of it on rank 0, else its part of the model's state."""
    if stack.world.is_main:
        return dict(tree)
    return {key: tree[key] for key in DIVIDED if key in tree}


def group_of(stack: Stack, check: Callable[[], None] | None) -> SaveGroup:
    """The ranks, for one save together. Every rank calls it."""
    token = stack.collectives.broadcast_object(secrets.token_hex(8))
    return SaveGroup(stack.world.rank, stack.world.size, token, check=check)


def on_all(act: Callable[[], T], path: str, stack: Stack) -> T:
    """Do something on every rank. An error on one is raised on all, so that none goes on alone."""
    problem: Exception | None = None
    done: list[T] = []
    try:
        done.append(act())
    except Exception as error:  # noqa: BLE001 - raised below, here and on all other ranks
        problem = error
    said = gather_objects(
        None if problem is None else str(problem), stack.collectives, stack.strategy.device
    )
    if problem is not None:
        raise problem
    for rank, text in enumerate(said):
        if text is not None:
            raise CheckpointError(
                f"Rank {rank} could not save {path!r}: {text}", f"See rank {rank}'s error."
            )
    return done[0]


def in_memory(part: Any) -> Any:
    """A part of a tree with its stored tensors read."""
    if isinstance(part, StoredTensor):
        return part.read()
    if type(part) is dict:
        return {key: in_memory(item) for key, item in part.items()}
    if type(part) is list or type(part) is tuple:
        return type(part)(in_memory(item) for item in part)
    return part
