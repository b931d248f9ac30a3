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

#: Of a square matrix of 36 MiB in float32: more than what allocators of the host keep for later.
SIDE = 3072
MATRIX = 4 * SIDE * SIDE
RUNS = 3


class Square(torch.nn.Module):
    """One large parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """One matrix product."""
        return features @ self.weight


def train(backend: Backend, target: Target) -> None:
    """One run from beginning to end, of which nothing is kept."""
    precision = backend.precision(usual_precision(target))
    accelerator = backend.accelerator()
    accelerator.activate(0, 1)
    context = StrategyContext(accelerator, 0, World(), backend.collectives(World()), precision)
    setup = make_setup(
        target.make_strategy(backend, target.one_device_strategy, context),
        precision,
        module=Square(),
        optimizers=lambda module: [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)],
        loss=lambda module, item: module(item).square().mean(),
    )
    setup.train([[torch.ones(2, SIDE)]] * 2)
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
    for _ in range(RUNS):
        train(device_backend, target)
    grown = allocated() - before
    assert grown < 2 * MATRIX, (
        f"A10: memory of a run is released when it is closed; after {RUNS} runs, each of three "
        f"matrices of {MATRIX >> 20} MiB, {grown / 2**20:.0f} MiB more are allocated"
    )
