"""What data parallel training costs per step on two CPU processes, beside hand-written DDP.

Every contender trains the same network on the same batches over gloo, started by torchrun, one
thread per process. Contenders take turns, a fresh pair of processes each time; what counts is the
median of the fastest quarter of all stretches of 50 steps over all rounds.

    python -m nox -s benchmarks -- ddp_step
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

WARM_UP = 50
STRETCH = 50
BATCHES = 16


def network():
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


class Batches:
    """This rank's prebuilt batches; notes the time before every stretch."""

    def __init__(self, steps: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.data = [
            (
                torch.randn(64, 256, generator=generator),
                torch.randint(0, 10, (64,), generator=generator),
            )
            for _ in range(BATCHES)
        ]
        self.steps = steps
        self.times: list[float] = []

    def __len__(self) -> int:
        return self.steps + WARM_UP + 1

    def __iter__(self) -> Iterator[object]:
        for index in range(WARM_UP):
            yield self.data[index % BATCHES]
        for index in range(self.steps):
            if index % STRETCH == 0:
                self.times.append(time.perf_counter())
            yield self.data[index % BATCHES]
        self.times.append(time.perf_counter())
        yield self.data[0]


def by_hand(batches: Batches):
    import torch
    from torch import nn

    torch.distributed.init_process_group("gloo")
    net = network()
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.distributed.destroy_process_group()
    return net


def _model(base):
    import torch
    from torch import nn

    class Model(base):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Model()


PLAIN = {
    "max_epochs": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "enable_checkpointing": False,
}


def with_drivetrain(batches: Batches):
    import drivetrain

    model = _model(drivetrain.Module)
    drivetrain.Trainer(accelerator="cpu", devices=2, strategy="ddp", **PLAIN).fit(model, batches)
    return model.net


def with_lightning(batches: Batches):
    import lightning.pytorch as lp

    model = _model(lp.LightningModule)
    lp.Trainer(accelerator="cpu", devices=2, strategy="ddp", **PLAIN).fit(model, batches)
    return model.net


def with_accelerate(batches: Batches):
    import torch
    from accelerate import Accelerator
    from torch import nn

    runner = Accelerator(cpu=True)
    net = network()
    model, optimizer = runner.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        runner.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return net


CONTENDERS: dict[str, tuple[str, Callable[[Batches], object]]] = {
    "hand-written DDP": ("torch", by_hand),
    "drivetrain": ("drivetrain", with_drivetrain),
    "Lightning": ("lightning", with_lightning),
    "Accelerate": ("accelerate", with_accelerate),
}


def work(name: str, steps: int, output: str) -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    batches = Batches(steps)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = CONTENDERS[name][1](batches)
    if os.environ["RANK"] == "0":
        times = [(b - a) / STRETCH for a, b in zip(batches.times, batches.times[1:])]
        checksum = float(sum(p.double().abs().sum() for p in net.parameters()))
        with open(output, "w", encoding="utf-8") as file:
            json.dump({"times": times, "checksum": checksum}, file)


def run_one(name: str, steps: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "out.json")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=2",
                __file__,
                "--worker",
                name,
                "--steps",
                str(steps),
                "--output",
                output,
            ],
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        with open(output, encoding="utf-8") as file:
            return json.load(file)


def main() -> None:
    import importlib.util

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help=f"a multiple of {STRETCH}")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.steps, options.output)
        return
    names = [name for name, (package, _) in CONTENDERS.items() if importlib.util.find_spec(package)]
    times: dict[str, list[float]] = {name: [] for name in names}
    sums: dict[str, float] = {}
    for _ in range(options.rounds):
        for name in names:
            result = run_one(name, options.steps)
            times[name] += result["times"]
            sums[name] = result["checksum"]
    base = None
    print(f"| {'two ranks over gloo':20} | ms a step | ratio | sum of weights |")
    print(f"|{'-' * 22}|----------:|------:|---------------:|")
    for name in names:
        value = statistics.median(sorted(times[name])[: max(1, len(times[name]) // 4)])
        base = base or value
        print(f"| {name:20} | {value * 1e3:9.3f} | {value / base:5.3f} | {sums[name]:14.6f} |")
    spread = {f"{value:.6f}" for value in sums.values()}
    print("final weights agree" if len(spread) == 1 else f"FINAL WEIGHTS DIFFER: {sorted(spread)}")


if __name__ == "__main__":
    main()
