"""Memory comes back when a run is over."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch
from drivetrain_interfaces import StrategyContext, SupportsMemoryStats, World

from drivetrain_conformance.fixtures import usual_precision
from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.setups import make_setup

if TYPE_CHECKING:
    from drivetrain_interfaces import Accelerator, Backend

    from drivetrain_conformance.target import Target

SIDE = 1024  # of a square matrix of parameters, which are 4 MiB in float32
ROWS = 4


def train(backend: Backend, target: Target) -> None:
    """One run from beginning to end, of which nothing is kept."""
    precision = backend.precision(usual_precision(target))
    accelerator = backend.accelerator()
    context = StrategyContext(accelerator, 0, World(), backend.collectives(World()), precision)
    setup = make_setup(
        target.make_strategy(backend, target.one_device_strategy, context),
        precision,
        module=torch.nn.Linear(SIDE, SIDE, bias=False),
        optimizers=lambda module: [torch.optim.Adam(module.parameters())],
        loss=lambda module, item: module(item).square().mean(),
    )
    setup.train([[torch.ones(ROWS, SIDE)]] * 2)
    setup.strategy.close()
    accelerator.close()


def test_memory_comes_back_after_close(
    accelerator: Accelerator, device_backend: Backend, target: Target
) -> None:
    """Parameters, gradients and moments of a run do not outlive it.

    R: A10, A11, S35
    """
    if not isinstance(accelerator, SupportsMemoryStats):
        pytest.skip(f"{BY_DECLARATION}the accelerator has no memory_stats")
    device = accelerator.activate(0, 1)

    def allocated() -> float:
        gc.collect()
        accelerator.synchronize(device)
        return accelerator.memory_stats(device)["allocated"]

    train(device_backend, target)  # a library's work space is kept, and does not count
    before = allocated()
    for _ in range(4):
        train(device_backend, target)
    grown = allocated() - before
    one_run = 4 * SIDE * SIDE * 4  # parameters, gradients and two moments in float32
    assert grown < one_run, (
        f"A10: memory of a run is released when it is closed; after four runs of "
        f"{one_run >> 20} MiB, {grown / 2**20:.0f} MiB more are allocated"
    )
