"""Training of the reference models, alone or by several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import EvalSpec

from drivetrain_conformance.reference_models import MODELS, ROWS, STEPS, cross_entropy
from drivetrain_conformance.support.problems import parameters_of
from drivetrain_conformance.support.setups import make_setup

if TYPE_CHECKING:
    from drivetrain_interfaces import Precision, Strategy

    from drivetrain_conformance.support.ranks import Rank


def curve(
    strategy: Strategy, precision: Precision, model: str, *, part: slice = slice(None)
) -> dict[str, Any]:
    """The losses of all updates, and of an evaluation after them.

    Args:
        strategy: Bound to this process.
        precision: What it was bound with.
        model: Name of a reference model.
        part: The rows of each batch that this process trains on.
    """
    recipe = MODELS[model]
    setup = make_setup(
        strategy,
        precision,
        module=recipe.make(0.0),
        optimizers=recipe.optimizers,
        loss=cross_entropy,
    )
    windows = [[tuple(t[part] for t in batch) for batch in window] for window in recipe.windows()]
    losses = [float(result.loss) for result in setup.train(windows)]
    setup.module.eval()
    spec = EvalSpec(setup.module, cross_entropy, inference_mode=False)
    with strategy.eval_step(spec) as step:
        evaluation = float(step(strategy.feed(recipe.batches[0])))
    return {"losses": losses, "evaluation": evaluation}


def share_of_curve(rank: Rank, name: str, model: str) -> dict[str, Any]:
    """The curve of one rank, on its share of each batch."""
    precision = rank.precision()
    size = ROWS // rank.world.size
    part = slice(rank.world.rank * size, (rank.world.rank + 1) * size)
    return curve(rank.bind(name, precision), precision, model, part=part)


def repeatable(strategy: Strategy, precision: Precision, model: str) -> dict[str, Any]:
    """The losses and parameters of a run with dropout that starts from a seed."""
    torch.manual_seed(1234)
    recipe = MODELS[model]
    setup = make_setup(
        strategy,
        precision,
        module=recipe.make(0.25),
        optimizers=recipe.optimizers,
        loss=cross_entropy,
    )
    losses = [result.loss.cpu() for result in setup.train(recipe.windows(STEPS // 2))]
    return {"losses": torch.stack(losses), **parameters_of(setup.module)}
