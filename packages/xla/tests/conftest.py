"""The real torch_xla on its CPU runtime: the user's word for that comes before anything else."""

from __future__ import annotations

import os

os.environ["PJRT_DEVICE"] = "CPU"

import pytest
import torch
from drivetrain_interfaces import StepSpec, StrategyContext, World
from torch import nn

from drivetrain_xla.backend import XlaBackend
from drivetrain_xla.runtime import open_runtime


def pytest_configure(config):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    spmd = any("test_spmd_" in argument for argument in config.args)
    if spmd:
        os.environ["CPU_NUM_DEVICES"] = "4"
    # Torch's engine counts devices once: no test may compute a gradient before they are there.
    open_runtime(spmd=spmd)


def mean_square(module, batch):
    return (module(batch[0]) - batch[1]).square().mean()


class Lab:
    """Small models and batches, and strategies bound to this process."""

    loss = staticmethod(mean_square)

    def __init__(self):
        self.backend = XlaBackend()
        self.bound = []

    def context(self, precision="32-true", **options):
        if isinstance(precision, str):
            precision = self.backend.precision(precision)
        world = World()
        return StrategyContext(
            accelerator=self.backend.accelerator(),
            device_index=0,
            world=world,
            collectives=self.backend.collectives(world),
            precision=precision,
            options=options,
        )

    def bind(self, name="single_device", precision="32-true", **options):
        strategy = self.backend.strategy(name, self.context(precision, **options))
        self.bound.append(strategy)
        return strategy

    @staticmethod
    def model(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    @staticmethod
    def batches(count, rows=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(rows, 4, generator=generator), torch.randn(rows, 2, generator=generator))
            for _ in range(count)
        ]

    def build(self, strategy, model=None, optimizer=None, **settings):
        module = strategy.prepare(self.model() if model is None else model)
        made = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
        optimizers = [made(module.parameters())]
        loss = settings.pop("loss", mean_square)
        return (
            module,
            optimizers,
            strategy.train_step(StepSpec(module, optimizers, loss, **settings)),
        )

    def train(self, strategy, batches, **settings):
        """The losses of one update for each batch."""
        module, _, step = self.build(strategy, **settings)
        with step:
            losses = [step([strategy.feed(batch)]).loss for batch in batches]
        return [float(loss) for loss in losses], module


@pytest.fixture
def lab():
    made = Lab()
    yield made
    for strategy in made.bound:
        strategy.close()


@pytest.fixture
def by_hand():
    """The losses and parameters of the same training by hand, on the CPU."""

    def train(model, batches, optimizer=None):
        made = (optimizer or (lambda p: torch.optim.AdamW(p, lr=0.05)))(model.parameters())
        losses = []
        for batch in batches:
            loss = mean_square(model, batch)
            loss.backward()
            made.step()
            made.zero_grad()
            losses.append(float(loss.detach()))
        return losses, model

    return train
