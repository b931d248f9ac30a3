"""What two ranks are asked to do with a strategy. Run by ``crew.py``."""

from __future__ import annotations

import torch
from drivetrain_interfaces import Clip, StepSpec
from drivetrain_toolkit.strategies import DDPStrategy
from torch import nn

from drivetrain_deepspeed import DeepSpeedStrategy

STEPS = 20


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 31), nn.Tanh(), nn.Linear(31, 3))


def adamw(module):
    first, *rest = module.parameters()
    return torch.optim.AdamW([{"params": [first], "lr": 2e-2}, {"params": rest}], lr=1e-2)


def loss(module, batch):
    features, targets = batch
    return (module(features) - targets).square().mean()


def windows(rank, steps=STEPS, accumulate=1, start=0):
    made = []
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 * rank + number)
        count = accumulate if number % 3 else max(1, accumulate - 1)
        made.append(
            [
                (
                    torch.randn(8, 16, generator=generator),
                    torch.randn(8, 3, generator=generator),
                )
                for _ in range(count)
            ]
        )
    return made


class Run:
    """A strategy, its module, optimizer and step."""

    def __init__(self, rank, strategy, precision="32-true", module=None, make=adamw, **settings):
        self.rank = rank
        self.strategy = rank.bind(strategy, precision)
        self.module = self.strategy.prepare(network(rank.world.rank) if module is None else module)
        self.optimizer = make(self.module)
        settings.setdefault("accumulate", 1)
        self.step = self.strategy.train_step(
            StepSpec(self.module, [self.optimizer], loss, **settings)
        )
        self.accumulate = settings["accumulate"]

    def train(self, steps=STEPS, start=0):
        made = windows(self.rank.world.rank, steps, self.accumulate, start)
        with self.step:
            return [self.step(window) for window in made]

    def state(self):
        state = self.strategy.state()
        return dict(state.module), list(state.optimizers), dict(state.precision)

    def close(self):
        self.strategy.close()


def trained(rank, strategy, precision="32-true", **settings):
    run = Run(rank, strategy, precision, **settings)
    results = run.train()
    answer = {
        "state": run.state(),
        "losses": [float(r.loss) for r in results],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
    }
    run.close()
    return answer


def every_stage(rank):
    """The same training by DDP and at every stage."""
    answers = {}
    for name, settings in {
        "plain": {},
        "clipped": {"clip": Clip(0.1)},
        "accumulated": {"accumulate": 3, "clip": Clip(0.1)},
    }.items():
        answers[name] = {"ddp": trained(rank, DDPStrategy(), **settings)}
        for stage in (0, 1, 2, 3):
            answers[name][stage] = trained(rank, DeepSpeedStrategy(stage), **settings)
    return answers
