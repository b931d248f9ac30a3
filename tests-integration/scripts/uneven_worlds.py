"""Ranks with different numbers of batches, for the tests of DDP's ``uneven_inputs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import DrivetrainError, StepSpec, UserCodeError
from strategy_worlds import batches, bound, loss_of, model, parameters
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

WITH_BATCH_NORM = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def adam(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def train(rank: Any, counts: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
    """Some windows on each rank, as many as ``counts`` says, twice."""
    strategy = bound(rank, "DDPStrategy", {"uneven_inputs": True, **options})
    module = strategy.prepare(model(rank.world.rank))
    optimizer = adam(module)
    step = strategy.train_step(StepSpec(module, [optimizer], loss_of))
    drawn = batches(rank.world.rank, sum(counts))
    losses = []
    for part in range(2):
        count = counts[(rank.world.rank + part) % len(counts)]
        with step:
            losses += [float(step([drawn.pop(0)]).loss) for _ in range(count)]
    state = strategy.state()
    try:
        outside = str(step([batches(rank.world.rank, 1)[0]]))
    except UserCodeError as error:
        outside = str(error)
    strategy.close()
    return {
        "end": parameters(module),
        "losses": losses,
        "state": list(state.optimizers),
        "outside": outside,
    }


def expected(rank: Any, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """One process that averages over the ranks that still have a batch."""
    module, size = model(0), rank.world.size
    optimizer = adam(module)
    drawn = [batches(rank, sum(counts)) for rank in range(size)]
    for part in range(2):
        left = [counts[(rank + part) % size] for rank in range(size)]
        for number in range(max(left)):
            active = [rank for rank in range(size) if number < left[rank]]
            _update(module, optimizer, [drawn[rank].pop(0) for rank in active])
    return parameters(module)


def _update(module: nn.Module, optimizer: Any, some: Sequence[Any]) -> None:
    for batch in some:
        (loss_of(module, batch) / len(some)).backward()
    optimizer.step()
    optimizer.zero_grad()


def refused(rank: Any, kind: str, options: dict[str, Any], spec: dict[str, Any]) -> str:
    """The text of the refusal."""
    try:
        strategy = bound(rank, kind, {"uneven_inputs": True, **options})
        module = strategy.prepare(WITH_BATCH_NORM if spec.pop("norm", False) else model(0))
        if isinstance(module, nn.Sequential):
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        kinds = {"lbfgs": torch.optim.LBFGS}
        optimizer = kinds.get(spec.pop("optimizer", ""), torch.optim.SGD)(module.parameters())
        weight = (lambda _: 1.0) if spec.get("weight_over_ranks") else None
        strategy.train_step(StepSpec(module, [optimizer], loss_of, weight=weight, **spec))
    except DrivetrainError as error:
        return str(error)
    return "nothing was refused"
