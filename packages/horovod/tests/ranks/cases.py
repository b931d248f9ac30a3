"""What two ranks are asked to do with Horovod. Run by ``crew.py``."""

from __future__ import annotations

import torch
from drivetrain_interfaces import Clip, ClusterError, ModelState, StepSpec, UserCodeError, World
from drivetrain_toolkit.strategies import DDPStrategy
from torch import nn

from drivetrain_horovod import HorovodStrategy
from drivetrain_horovod.starting import start


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 31), nn.Tanh(), nn.Linear(31, 3))


def loss(module, batch):
    features, targets = batch
    return (module(features) - targets).square().mean()


def windows(rank, steps=20, accumulate=1, start=0):
    made = []
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 * rank + number)
        count = accumulate if number % 3 else max(1, accumulate - 1)
        made.append(
            [
                (torch.randn(8, 16, generator=generator), torch.randn(8, 3, generator=generator))
                for _ in range(count)
            ]
        )
    return made


class Run:
    """A strategy, its module, optimizer, scheduler and step."""

    def __init__(self, rank, strategy, precision="32-true", **settings):
        self.rank = rank
        self.strategy = rank.bind(strategy, precision)
        self.module = self.strategy.prepare(network(rank.world.rank))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.5)
        settings.setdefault("accumulate", 1)
        self.accumulate = settings["accumulate"]
        self.step = self.strategy.train_step(
            StepSpec(self.module, [self.optimizer], loss, **settings)
        )

    def train(self, steps=20, start=0):
        results = []
        with self.step:
            for window in windows(self.rank.world.rank, steps, self.accumulate, start):
                results.append(self.step(window))
                self.scheduler.step()
        return results

    def state(self):
        state = self.strategy.state()
        return dict(state.module), list(state.optimizers), dict(state.precision)


def trained(rank, strategy, precision="32-true", **settings):
    run = Run(rank, strategy, precision, **settings)
    results = run.train()
    answer = {
        "state": run.state(),
        "losses": [float(r.loss) for r in results],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    run.strategy.close()
    return answer


def as_ddp(rank):
    """The same training by DDP and by Horovod."""
    answers = {}
    for name, precision, settings in (
        ("plain", "32-true", {}),
        ("clipped", "32-true", {"clip": Clip(0.1)}),
        ("accumulated", "32-true", {"accumulate": 3, "clip": Clip(0.1)}),
        ("mixed", "bf16-mixed", {}),
    ):
        answers[name] = {
            "ddp": trained(rank, DDPStrategy(), precision, **settings),
            "horovod": trained(rank, HorovodStrategy(), precision, **settings),
        }
    answers["compressed"] = {
        "ddp": answers["plain"]["ddp"],
        "horovod": trained(rank, HorovodStrategy(compression="fp16")),
    }
    return answers


def resumed(rank):
    """Ten steps, a state, and ten more from there by Horovod and by DDP."""
    run = Run(rank, HorovodStrategy())
    run.train(10)
    state, schedule = run.state(), run.scheduler.state_dict()
    run.train(10, start=10)
    answer = {"state": state, "end": run.state()}
    run.strategy.close()
    for name, strategy in (("horovod", HorovodStrategy()), ("ddp", DDPStrategy())):
        run = Run(rank, strategy)
        run.strategy.load(ModelState(*state))
        run.scheduler.load_state_dict(schedule)
        run.train(10, start=10)
        answer[name] = run.state()
        run.strategy.close()
    return answer


def leaves_nothing(rank):
    """User code raises in the middle of a window; after close, a rank trains alone."""
    run = Run(rank, HorovodStrategy(), accumulate=3)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    window = windows(0, 1, 3, start=1)[0]
    text = ""
    try:
        run.step([window[0], ("not", "a batch"), window[2]])
    except TypeError as error:
        text = type(error).__name__
    still = all(torch.equal(before[n], p) for n, p in run.module.named_parameters())
    run.train(2)
    run.strategy.close()
    if rank.world.rank == 0:
        loss(run.module, window[0]).backward()
    called = ""
    try:
        run.step(window)
    except UserCodeError as error:
        called = error.code
    rank.collectives.barrier()
    return {"text": text, "still": still, "called": called}


def other_world(rank):
    """A world of another size than Horovod has, as under a launcher that it does not know."""
    try:
        start(World(), rank.collectives)
    except ClusterError as error:
        return error.message
    return ""
