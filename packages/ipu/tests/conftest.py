"""The simulated SDK in place of the real one, and small models to train on it."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_interfaces import StepSpec, StrategyContext, World
from torch import nn

SIMULATOR = Path(__file__).parent / "fake_sdk"
sys.path.insert(0, str(SIMULATOR))

from drivetrain_ipu.backend import IpuBackend  # noqa: E402
from drivetrain_ipu.strategy import IpuStrategy  # noqa: E402


def pytest_configure(config: Any) -> None:
    os.environ["IPUOF_VIPU_API_PARTITION_ID"] = "simulated"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(SIMULATOR), os.environ.get("PYTHONPATH", "")) if part
    )


def mean_square(module: Any, batch: Any) -> Any:
    return (module(batch[0]) - batch[1]).square().mean()


class Lab:
    """Small models and batches, and strategies bound to this process."""

    loss = staticmethod(mean_square)

    def __init__(self) -> None:
        self.backend = IpuBackend()
        self.bound: list[Any] = []

    def context(
        self, precision: Any = "32-true", world: Any = None, collectives: Any = None, **fields: Any
    ) -> Any:
        if isinstance(precision, str):
            precision = self.backend.precision(precision)
        return StrategyContext(
            accelerator=self.backend.accelerator(),
            device_index=0,
            world=world or World(),
            collectives=collectives or self.backend.collectives(World()),
            precision=precision,
            **fields,
        )

    def bind(self, precision: Any = "32-true", devices: Any = 1, **options: Any) -> Any:
        strategy = IpuStrategy(**options)(self.context(precision, devices=tuple(range(devices))))
        self.bound.append(strategy)
        return strategy

    @staticmethod
    def model(seed: Any = 0) -> Any:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    @staticmethod
    def batches(count: Any, rows: Any = 4, seed: Any = 0) -> Any:
        made = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(rows, 4, generator=made), torch.randn(rows, 2, generator=made))
            for _ in range(count)
        ]

    def build(
        self, strategy: Any, model: Any = None, optimizer: Any = None, **settings: Any
    ) -> Any:
        module = strategy.prepare(self.model() if model is None else model)
        made = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))
        optimizers = [made(module.parameters())]
        loss = settings.pop("loss", mean_square)
        step = strategy.train_step(StepSpec(module, optimizers, loss, **settings))
        return module, optimizers[0], step

    def train(self, strategy: Any, windows: Any, **settings: Any) -> Any:
        """The losses of one update for each window, and the module."""
        module, _, step = self.build(strategy, **settings)
        with step:
            losses = [float(step(window).loss) for window in windows]
        return losses, module

    @staticmethod
    def by_hand(
        model: Any, windows: Any, optimizer: Any = None, loss: Any = mean_square, clip: Any = None
    ) -> Any:
        """The same training in plain torch: each window is one update by the mean of its losses."""
        model = copy.deepcopy(model)
        made = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)))(
            model.parameters()
        )
        losses = []
        for window in windows:
            total = sum(loss(model, batch) for batch in window) / len(window)
            total.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            made.zero_grad()
            losses.append(float(total.detach()))
        return losses, model

    @staticmethod
    def apart(one: Any, other: Any) -> Any:
        """The largest difference between the parameters and buffers of two modules."""
        mine, theirs = one.state_dict(), other.state_dict()
        return max(float((mine[n].float() - theirs[n].float()).abs().max()) for n in mine)


@pytest.fixture
def lab() -> Any:
    made = Lab()
    yield made
    for strategy in made.bound:
        strategy.close()


@pytest.fixture
def simulator() -> Any:
    """The folder that is put before others to have ``poptorch``."""
    return SIMULATOR
