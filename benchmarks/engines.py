"""What a step costs that an engine makes, beside a loop that is written for the engine by hand.

Two processes over gloo, one thread each, started by torchrun. In each process both train a network
of their own on the same batches, with the same engine, and take turns of some steps; what counts is
the median of the ratios of neighbouring turns. The order changes with each pair.

    python benchmarks/engines.py --engines deepspeed_stage_1 deepspeed_stage_2
    python benchmarks/engines.py --engines horovod

Run it where the engine is installed, as in the environment of ``nox -s "backend(horovod)"``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

BATCHES = 16
WARM_UP = 20


def network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[Any] = [nn.Linear(256, 512), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def loss_of(net: Any, batch: Any) -> Any:
    from torch import nn

    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def adamw(net: Any) -> Any:
    import torch

    return torch.optim.AdamW(net.parameters(), lr=1e-3)


def strategy_step(name: str, net: Any) -> tuple[Callable[[Any], Any], Any]:
    """One step of ours, and the strategy that made it."""
    from drivetrain_interfaces import StepSpec, StrategyContext, World
    from drivetrain_interfaces.discovery import load_backend, load_strategy

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = load_backend("cpu").load()
    accelerator = backend.accelerator()
    accelerator.activate(0, size)
    world = World(
        rank, size, rank, size,
        address=os.environ["MASTER_ADDR"], port=int(os.environ["MASTER_PORT"]),
    )  # fmt: skip
    context = StrategyContext(
        accelerator, 0, world, backend.collectives(world), backend.precision("32-true")
    )
    strategy = load_strategy(name).load()(context)
    module = strategy.prepare(net)
    step = strategy.train_step(StepSpec(module, [adamw(module)], loss_of))
    return lambda batch: step((batch,)), strategy


def hand_step(name: str, net: Any, strategy: Any) -> Callable[[Any], Any]:
    """One step as the engine's own documentation writes it."""
    if name == "horovod":
        import horovod.torch as hvd

        named = [(f"hand.{n}", p) for n, p in net.named_parameters()]
        optimizer = hvd.DistributedOptimizer(adamw(net), named_parameters=named)

        def with_horovod(batch: Any) -> None:
            loss_of(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return with_horovod
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 64,
        "zero_optimization": {"stage": strategy.stage},
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=adamw(net), config=config, dist_init_required=False
    )

    def with_deepspeed(batch: Any) -> None:
        engine.backward(loss_of(engine, batch))
        engine.step()

    return with_deepspeed


def work(name: str, pairs: int, steps: int, output: str) -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    data = [
        (
            torch.randn(64, 256, generator=generator),
            torch.randint(0, 10, (64,), generator=generator),
        )
        for _ in range(BATCHES)
    ]
    ours, strategy = strategy_step(name, network())
    hand = hand_step(name, network(), strategy)
    times: dict[str, list[float]] = {"ours": [], "hand": []}

    def turn(step: Callable[[Any], Any], count: int) -> float:
        torch.distributed.barrier()
        start = time.perf_counter()
        for index in range(count):
            step(data[index % BATCHES])
        return (time.perf_counter() - start) / count

    for step in (ours, hand):
        turn(step, WARM_UP)
    for pair in range(pairs):
        order = [("ours", ours), ("hand", hand)]
        for who, step in order if pair % 2 else order[::-1]:
            times[who].append(turn(step, steps))
    if os.environ["RANK"] == "0":
        with open(output, "w", encoding="utf-8") as file:
            json.dump(times, file)
    torch.distributed.barrier()
    os._exit(0)


def run_one(name: str, pairs: int, steps: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "out.json")
        words = ("--worker", name, "--pairs", str(pairs), "--steps", str(steps))
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                __file__, *words, "--output", output,
            ],
            check=False, timeout=600, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        if not os.path.exists(output):
            raise SystemExit(done.stdout + done.stderr)
        with open(output, encoding="utf-8") as file:
            made: dict[str, list[float]] = json.load(file)
            return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["horovod"])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="of one turn")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work(options.worker, options.pairs, options.steps, options.output)
        return
    print(f"| {'two ranks over gloo':20} | by hand, ms | ours, ms | ratio of pairs |")
    print(f"|{'-' * 22}|------------:|---------:|---------------:|")
    for name in options.engines:
        times = run_one(name, options.pairs, options.steps)
        hand, ours = (statistics.median(times[who]) * 1e3 for who in ("hand", "ours"))
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["hand"]))
        print(f"| {name:20} | {hand:11.3f} | {ours:8.3f} | {ratio:14.3f} |", flush=True)


if __name__ == "__main__":
    main()
