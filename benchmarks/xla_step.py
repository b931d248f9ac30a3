"""What a step of drivetrain-xla costs over the same step written by hand with torch_xla.

PJRT_DEVICE=CPU python benchmarks/xla_step.py      needs torch_xla; see packages/xla/README.md

Both take turns in one process, with one model each, so that a busy machine disturbs both alike.
Prints the ratio of the median times, and what each step did by torch_xla's counters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import StepSpec, StrategyContext, World
from drivetrain_interfaces.discovery import load_backend
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP = 5
MOST = 1.05


def model(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def ours(width: int) -> tuple[Callable[[Any], Any], Any]:
    backend = load_backend("xla").load()
    accelerator = backend.accelerator()
    accelerator.activate(0, 1)
    world = World()
    context = StrategyContext(
        accelerator, 0, world, backend.collectives(world), backend.precision("32-true")
    )
    strategy = backend.strategy("single_device", context)
    module = strategy.prepare(model(width))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    step = strategy.train_step(StepSpec(module, [optimizer], loss))
    return lambda batch: step((strategy.feed(batch),)), strategy


def by_hand(width: int) -> Callable[[Any], Any]:
    import torch_xla

    device = torch_xla.device()
    module = model(width).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def step(batch: Any) -> torch.Tensor:
        inputs, labels = batch[0].to(device), batch[1].to(device)
        loss = nn.functional.cross_entropy(module(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch_xla.sync()
        return loss.detach()

    return step


def timed(step: Callable[[Any], Any], batch: Any, wait: Callable[[], None]) -> float:
    started = time.perf_counter()
    step(batch)
    wait()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    mine, _ = ours(options.width)
    import torch_xla.core.xla_model as xm
    from drivetrain_xla import monitor

    hand = by_hand(options.width)
    batch = (torch.randn(options.rows, options.width), torch.randint(0, 10, (options.rows,)))
    for _ in range(WARM_UP):
        mine(batch)
        hand(batch)
    xm.wait_device_ops()
    did = {}
    for name, step in (("drivetrain", mine), ("by hand", hand)):
        before = monitor.counts()
        step(batch)
        did[name] = monitor.counts() - before
    times: dict[str, list[float]] = {"drivetrain": [], "by hand": []}
    for turn in range(options.steps):
        order = (("drivetrain", mine), ("by hand", hand))
        for name, step in order if turn % 2 else order[::-1]:
            times[name].append(timed(step, batch, xm.wait_device_ops))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    ratio = statistics.median(
        mine / hand for mine, hand in zip(times["drivetrain"], times["by hand"])
    )
    for name, median in medians.items():
        print(f"{name:12} {median * 1e3:8.3f} ms a step   {did[name]}")
    print(f"ratio {ratio:.3f}, at most {MOST} is wanted")


if __name__ == "__main__":
    main()
