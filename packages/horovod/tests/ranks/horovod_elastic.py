"""Six epochs of an elastic run; the rank on the second host is killed in the third, or comes then.

Which of both, the second argument says: ``lose`` or ``gain``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from drivetrain_interfaces import StepSpec

from drivetrain_horovod.elastic import run_elastic

FOLDER = Path(sys.argv[1])
CHANGE = sys.argv[2]
EPOCHS, AT = 6, 2
PATIENCE = 300.0


def loss(module, batch):
    return (module(batch[0]) - batch[1]).square().mean()


def build(strategy):
    torch.manual_seed(0)
    module = strategy.prepare(torch.nn.Linear(4, 1))
    return StepSpec(module, [torch.optim.AdamW(module.parameters(), lr=1e-2)], loss)


def batch_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def lose(world):
    """The rank on the second host is killed, once."""
    mark = FOLDER / "killed"
    if world.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def gain(state):
    """The only rank has the second host listed, and asks whether it has come until Horovod says so.

    Then ``check_host_updates`` raises what brings the ranks together.
    """
    if state.world.size > 1:
        return
    (FOLDER / "second").touch()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        state.check_host_updates()
        time.sleep(0.05)
    raise TimeoutError("the second host did not come")


def train(state):
    while state.epoch < EPOCHS:
        world = state.world
        if state.epoch == AT:
            lose(world) if CHANGE == "lose" else gain(state)
        result = state.step((batch_of(state.epoch),))  # alike on all ranks
        state.seen = [*state.seen, (state.epoch, world.size, float(result.loss))]
        state.epoch += 1
        state.commit()
    return state


def main():
    state = run_elastic(train, build, epoch=0, seen=[])
    left = state.strategy.state()
    kept = {"seen": state.seen, "module": dict(left.module)}
    kept["steps"] = [float(entry["step"]) for entry in left.optimizers[0]["state"].values()]
    torch.save(kept, FOLDER / f"end{state.world.rank}.pt")


if __name__ == "__main__":
    main()
