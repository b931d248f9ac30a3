"""What strategies cost per step on two CPU processes, beside the same thing hand-written on torch.

All contenders of one strategy live in the same two processes and take turns, a stretch of steps
each, so that what else the machine does hits all alike; what counts is the median over stretches of
the ratio to the hand-written one of the same turn.

    python -m nox -s benchmarks -- strategies [--turns 20] [--only fsdp]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

WARM_UP = 5
STRETCH = 10
WIDTH, ROWS = 256, 32
GOALS = {"ddp": 1.02, "fsdp": 1.03, "zero1": 1.03, "pipeline": 1.05}
MICROBATCHES = 4
#: What all ranks have together, by this rank's part of it.
WHOLE: dict[int, Any] = {}


def network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(8)))


def loss_of(module: Any, batch: Any) -> Any:
    return (module(batch[0]) - batch[1]).square().mean()


def adam(module: Any) -> Any:
    import torch

    return torch.optim.AdamW(module.parameters(), lr=1e-4)


def loop(call: Callable[[Any], Any], module: Any, optimizer: Any) -> Callable[[Any], None]:
    """The step that everybody writes by hand."""

    def step(batch: Any) -> None:
        loss = loss_of(call, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hand_ddp() -> Callable[[Any], None]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network())
    return loop(model, model, adam(model))


def hand_fsdp() -> Callable[[Any], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = network(), init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(model, model, adam(model))


def hand_zero1() -> Callable[[Any], None]:
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4)
    return loop(model, model, optimizer)


def half_of_a_pipeline(rank: int) -> tuple[Any, Any]:
    """This rank's schedule of half the layers, and their optimizer."""
    import torch
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    layers = network()[4 * rank : 4 * rank + 4]
    stage = PipelineStage(layers, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(
        stage, MICROBATCHES, loss_fn=lambda made, wanted: (made - wanted).square().mean()
    )
    return schedule, adam(layers)


def hand_pipeline() -> Callable[[Any], None]:
    """Ranks draw a part of the batch each, as ours do, and all of them know the loss."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    schedule, optimizer = half_of_a_pipeline(rank)

    def together(mine: Any, where: int) -> Any:
        """The rows of both ranks, for the one that needs them."""
        parts = [torch.empty_like(mine) for _ in range(2)] if rank == where else None
        dist.gather(mine, parts, dst=where)
        return None if parts is None else torch.cat(parts)

    def step(batch: Any) -> None:
        features, targets = together(batch[0], 0), together(batch[1], 1)
        loss = torch.zeros(())
        if rank == 0:
            schedule.step(features)
        else:
            losses: list[Any] = []
            schedule.step(target=targets, losses=losses)
            loss = torch.stack(losses).detach().mean()
        sending = dist.broadcast(loss, src=1, async_op=True)
        optimizer.step()
        optimizer.zero_grad()
        sending.wait()

    return step


def hand_pipeline_whole() -> Callable[[Any], None]:
    """Each rank has the whole batch at hand, and nothing has to be sent but activations."""
    import torch.distributed as dist

    rank = dist.get_rank()
    schedule, optimizer = half_of_a_pipeline(rank)

    def step(batch: Any) -> None:
        features, targets = WHOLE[id(batch)]
        if rank == 0:
            schedule.step(features)
        else:
            schedule.step(target=targets)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(kind: str, **options: Any) -> Callable[[], Callable[[Any], None]]:
    def make() -> Callable[[Any], None]:
        import torch.distributed as dist
        from drivetrain_cpu.backend import CpuBackend
        from drivetrain_interfaces import StepSpec, StrategyContext, World
        from drivetrain_toolkit import strategies

        backend, rank = CpuBackend(), dist.get_rank()
        world = World(rank, 2, rank, 2, address="127.0.0.1", port=int(os.environ["MASTER_PORT"]))
        strategy = getattr(strategies, kind)(**options)(
            StrategyContext(
                accelerator=backend.accelerator(),
                device_index=rank,
                world=world,
                collectives=backend.collectives(world),
                precision=backend.precision("32-true"),
            )
        )
        module = strategy.prepare(network())
        step = strategy.train_step(StepSpec(module, [adam(module)], loss_of))
        return lambda batch: step((strategy.feed(batch),))

    return make


def with_fabric(kind: str) -> Callable[[], Callable[[Any], None]]:
    def make() -> Callable[[Any], None]:
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=2, num_nodes=1, strategy=kind)
        fabric.launch()
        net = network()
        model, optimizer = fabric.setup(net, adam(net))

        def step(batch: Any) -> None:
            fabric.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


def with_accelerate() -> Callable[[Any], None]:
    from accelerate import Accelerator

    runner = Accelerator(cpu=True)
    net = network()
    model, optimizer = runner.prepare(net, adam(net))

    def step(batch: Any) -> None:
        runner.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTENDERS: dict[str, dict[str, Callable[[], Callable[[Any], None]]]] = {
    "ddp": {
        "hand-written": hand_ddp,
        "drivetrain": ours("DDPStrategy"),
        "Fabric": with_fabric("ddp"),
        "Accelerate": with_accelerate,
    },
    "fsdp": {
        "hand-written": hand_fsdp,
        "drivetrain": ours("FSDPStrategy", wrap=[str(number) for number in range(8)]),
        "Fabric (FSDP1)": with_fabric("fsdp"),
    },
    "zero1": {"hand-written": hand_zero1, "drivetrain": ours("Zero1Strategy")},
    "pipeline": {
        "hand-written": hand_pipeline,
        "drivetrain": ours("PipelineStrategy", microbatches=MICROBATCHES),
        "hand-written, no batch sent": hand_pipeline_whole,
    },
}


def run(rank: int, port: int, strategy: str, turns: int, results: Any) -> None:
    """One of two processes: build all contenders, then let them take turns."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({k: str(v) for k, v in {**place, "NODE_RANK": 0, "GROUP_RANK": 0}.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"  # Fabric then starts no processes of its own
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 2 * ROWS, WIDTH, generator=generator) for _ in range(STRETCH)]
    batches = [tuple(both[:, rank * ROWS : (rank + 1) * ROWS].contiguous()) for both in drawn]
    WHOLE.update({id(mine): tuple(both) for mine, both in zip(batches, drawn)})
    made, failed = {}, {}
    for name, make in CONTENDERS[strategy].items():
        try:
            made[name] = make()
            for _ in range(WARM_UP):
                made[name](batches[0])
        except Exception as error:  # noqa: BLE001, PERF203 - a peer that does not run is a result
            made.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(turns):
        order = list(made) if turn % 2 else list(made)[::-1]
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            for batch in batches:
                made[name](batch)
            dist.barrier()
            times[name].append((time.perf_counter() - began) / STRETCH * 1e3)
    if rank == 0:
        results.put((times, failed))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--only", choices=CONTENDERS, nargs="*")
    given = parser.parse_args()
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    print("| strategy | contender | ms a step | ratio | goal |\n|---|---|---:|---:|---:|")
    for strategy in given.only or CONTENDERS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=run, args=(rank, port, strategy, given.turns, results))
            for rank in range(2)
        ]
        for each in ranks:
            each.start()
        times, failed = results.get()
        for each in ranks:
            each.join()
        base = times["hand-written"]
        for name, mine in times.items():
            ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
            goal = f"{GOALS[strategy]}" if name == "drivetrain" else ""
            ms = statistics.median(mine)
            print(f"| {strategy} | {name} | {ms:.2f} | {ratio:.3f} | {goal} |", flush=True)
        for name, why in failed.items():
            print(f"| {strategy} | {name} | did not run: {why} | | |", flush=True)


if __name__ == "__main__":
    main()
