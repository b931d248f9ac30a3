"""Communication in a world of one: the identity, with the refusals of a larger world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from drivetrain_interfaces import (
    Collectives,
    ConfigurationError,
    ReduceOp,
    SupportsClose,
    UnsupportedError,
    World,
)

from drivetrain_conformance.support.messages import refused

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend


@pytest.fixture
def alone(device_backend: Backend) -> Collectives:
    """The collectives of a world of one."""
    return device_backend.collectives(World())


def test_one_process_is_the_identity(alone: Collectives) -> None:
    """A script for many runs alone.

    R: L1, B15
    """
    tensor = torch.arange(6.0).reshape(2, 3)
    for op in ReduceOp:
        assert torch.equal(alone.all_reduce(tensor, op), tensor), (
            f"L1: with one process all_reduce is the identity, also {op.value}"
        )
    gathered = alone.all_gather(tensor)
    assert len(gathered) == 1, f"L1: all_gather gives one tensor per rank, not {len(gathered)}"
    assert torch.equal(gathered[0], tensor), "L1: with one process all_gather is the identity"
    assert torch.equal(alone.broadcast(tensor), tensor), "L1: so is broadcast"
    assert alone.broadcast_object({"run": [7]}) == {"run": [7]}, "L1: so is broadcast_object"
    alone.barrier()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_mean_of_integers_is_refused_alone(alone: Collectives, dtype: torch.dtype) -> None:
    """So that a script does not fail only when it runs on several.

    R: L3, L1
    """
    rule = f"L3: a mean of {dtype} is refused, also in a world of one"
    with refused(UnsupportedError, naming="mean", rule=rule):
        alone.all_reduce(torch.zeros(2, dtype=dtype), ReduceOp.MEAN)


def test_a_sum_of_booleans_is_refused_alone(alone: Collectives) -> None:
    """It does not fit in a boolean.

    R: L3, L1
    """
    rule = "L3: a sum of booleans is refused, also in a world of one"
    with refused(UnsupportedError, naming="sum", rule=rule):
        alone.all_reduce(torch.tensor([True]), ReduceOp.SUM)


@pytest.mark.parametrize("source", [1, -1])
def test_a_source_outside_the_world_is_refused_alone(alone: Collectives, source: int) -> None:
    """With the source and the world in the text.

    R: L5, L1
    """
    rule = f"L5: a broadcast from rank {source} in a world of one is a ConfigurationError"
    with refused(ConfigurationError, naming=str(source), rule=rule):
        alone.broadcast(torch.ones(1), source)
    with refused(ConfigurationError, naming=str(source), rule=rule):
        alone.broadcast_object(1, source)


def test_closing_local_collectives_twice_is_harmless(alone: Collectives) -> None:
    """Where there is anything to close.

    R: L9
    """
    if isinstance(alone, SupportsClose):
        alone.close()
        alone.close()
