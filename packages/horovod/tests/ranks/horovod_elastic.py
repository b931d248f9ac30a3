"""Six epochs of an elastic run; the rank on the second host is killed in the third."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from drivetrain_interfaces import StepSpec

from drivetrain_horovod.elastic import run_elastic

FOLDER = Path(sys.argv[1])
EPOCHS = 6


def loss(module, batch):
    return (module(batch[0]) - batch[1]).square().mean()


def build(strategy):
    torch.manual_seed(0)
    module = strategy.prepare(torch.nn.Linear(4, 1))
    return StepSpec(module, [torch.optim.AdamW(module.parameters(), lr=1e-2)], loss)


def batch_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def train(state):
    while state.epoch < EPOCHS:
        world = state.world
        mark = FOLDER / "killed"
        if world.rank == 1 and state.epoch == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        result = state.step((batch_of(state.epoch),))  # alike on all ranks
        state.seen = [*state.seen, (state.epoch, world.size, float(result.loss))]
        state.epoch += 1
        state.commit()
    return state


def main():
    state = run_elastic(train, build, epoch=0, seen=[])
    if state.world.is_main:
        kept = {"seen": state.seen, "module": dict(state.strategy.state().module)}
        kept["steps"] = [
            float(entry["step"]) for entry in state.strategy.state().optimizers[0]["state"].values()
        ]
        torch.save(kept, FOLDER / "end.pt")


if __name__ == "__main__":
    main()
