"""What a training loop costs per step, beside a hand-written one and beside other frameworks.

Every contender trains the same MLP (64-32-10, ReLU) on the same prebuilt batches of 32 with SGD,
one thread, and the same number of steps. Contenders take turns, round by round, in one process.
Time is taken where the data is drawn, for every 50 steps (so each stretch holds one log point), and
set-up costs nobody anything. What counts is the mean of the fastest twentieth of the stretches over
all rounds: other work on the machine disturbs these least.

    python -m nox -s benchmarks -- step_overhead
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

WARM_UP = 200
BATCHES = 64
STRETCH = 50


class Batches:
    """Prebuilt batches; notes the time before every stretch of measured steps and at the end."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = [
            (
                torch.randn(32, 64, generator=generator),
                torch.randint(0, 10, (32,), generator=generator),
            )
            for _ in range(BATCHES)
        ]
        self.steps = steps
        self.times: list[float] = []

    def seconds_per_step(self) -> list[float]:
        return [(end - begin) / STRETCH for begin, end in zip(self.times, self.times[1:])]

    def __len__(self) -> int:
        return self.steps + WARM_UP + 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data = self.data
        for index in range(WARM_UP):
            yield data[index % BATCHES]
        for index in range(self.steps):
            if index % STRETCH == 0:
                self.times.append(time.perf_counter())
            yield data[index % BATCHES]
        self.times.append(time.perf_counter())
        # One more, since a loop that knows the length does not ask again after the last batch.
        yield data[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def by_hand(batches: Batches, _folder: str) -> nn.Module:
    net, loss_of = network(), nn.functional.cross_entropy
    optimizer = sgd(net.parameters())
    for x, y in batches:
        loss = loss_of(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def drivetrain_module(metrics: int) -> object:
    import drivetrain

    class Model(drivetrain.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            for number in range(metrics):
                self.log(NAMES[number], loss, prog_bar=number == 0)
            return loss

        def configure_optimizers(self):
            return sgd(self.parameters())

    return Model()


NAMES = [f"loss{number}" for number in range(20)]


def drivetrain_bare(batches: Batches, _folder: str) -> nn.Module:
    import drivetrain

    model = drivetrain_module(0)
    drivetrain.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    ).fit(model, batches)
    return model.net


def drivetrain_full(metrics: int) -> Callable[[Batches, str], nn.Module]:
    def run(batches: Batches, folder: str) -> nn.Module:
        import drivetrain

        model = drivetrain_module(metrics)
        drivetrain.Trainer(
            accelerator="cpu", max_epochs=1, default_root_dir=folder, enable_model_summary=False
        ).fit(model, batches)
        return model.net

    return run


def lightning_module(metrics: int) -> object:
    import lightning.pytorch as lp

    class Model(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            for number in range(metrics):
                self.log(NAMES[number], loss, prog_bar=number == 0)
            return loss

        def configure_optimizers(self):
            return sgd(self.parameters())

    return Model()


def lightning_bare(batches: Batches, _folder: str) -> nn.Module:
    import lightning.pytorch as lp

    model = lightning_module(0)
    lp.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    ).fit(model, batches)
    return model.net


def lightning_full(metrics: int) -> Callable[[Batches, str], nn.Module]:
    def run(batches: Batches, folder: str) -> nn.Module:
        import lightning.pytorch as lp
        from lightning.pytorch.loggers import CSVLogger

        model = lightning_module(metrics)
        lp.Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=folder,
            logger=CSVLogger(folder),
            enable_model_summary=False,
        ).fit(model, batches)
        return model.net

    return run


def fabric(batches: Batches, _folder: str) -> nn.Module:
    from lightning.fabric import Fabric

    runner = Fabric(accelerator="cpu", devices=1)
    runner.launch()
    net = network()
    model, optimizer = runner.setup(net, sgd(net.parameters()))
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        runner.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return net


def accelerate(batches: Batches, _folder: str) -> nn.Module:
    from accelerate import Accelerator

    runner = Accelerator(cpu=True)
    net = network()
    model, optimizer = runner.prepare(net, sgd(net.parameters()))
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        runner.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return net


def ignite(batches: Batches, _folder: str) -> nn.Module:
    from ignite.engine import Engine

    net = network()
    optimizer = sgd(net.parameters())

    def step(_engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    Engine(step).run(batches, max_epochs=1)
    return net


def runtime(batches: Batches, _folder: str) -> nn.Module:
    import drivetrain

    net = network()

    def main(stack: drivetrain.Runtime) -> None:
        model, (optimizer,) = stack.setup(net, sgd)
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            stack.backward(loss)
            stack.step(optimizer)

    drivetrain.Runtime(accelerator="cpu").launch(main)
    return net


CONTENDERS: dict[str, tuple[str, Callable[[Batches, str], nn.Module]]] = {
    "hand-written": ("torch", by_hand),
    "drivetrain, bare": ("drivetrain", drivetrain_bare),
    "drivetrain, full, 1 metric": ("drivetrain", drivetrain_full(1)),
    "drivetrain, full, 6 metrics": ("drivetrain", drivetrain_full(6)),
    "drivetrain.Runtime, own loop": ("drivetrain", runtime),
    "Lightning, bare": ("lightning", lightning_bare),
    "Lightning, full, 1 metric": ("lightning", lightning_full(1)),
    "Lightning, full, 6 metrics": ("lightning", lightning_full(6)),
    "Fabric, own loop": ("lightning", fabric),
    "Accelerate, own loop": ("accelerate", accelerate),
    "Ignite": ("ignite", ignite),
}


def loss_on_all(net: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(net(x), y) for x, y in batches.data]
    return float(torch.stack(losses).mean())


def measure(steps: int, rounds: int, only: str) -> dict[str, dict[str, object]]:
    import importlib.util

    seconds: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for turn in range(rounds):
        for name, (package, run) in CONTENDERS.items():
            if importlib.util.find_spec(package) is None or (
                only not in name and name != "hand-written"
            ):
                continue
            batches = Batches(steps)
            with tempfile.TemporaryDirectory() as folder, quiet():
                net = run(batches, folder)
            seconds.setdefault(name, []).extend(batches.seconds_per_step())
            losses[name] = loss_on_all(net, batches)
        print(f"round {turn + 1} of {rounds} done", file=sys.stderr)
    undisturbed = {
        name: statistics.mean(sorted(times)[: max(1, len(times) // 20)])
        for name, times in seconds.items()
    }
    base = undisturbed["hand-written"]
    return {
        name: {
            "us_per_step": time * 1e6,
            "added_us": (time - base) * 1e6,
            "ratio": time / base,
            "loss": losses[name],
        }
        for name, time in undisturbed.items()
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000, help=f"a multiple of {STRETCH}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of a contender's name")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.disable(logging.WARNING)
    table = measure(arguments.steps, arguments.rounds, arguments.only)
    if arguments.json:
        print(json.dumps(table, indent=2))
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"| {'loop':30} | µs a step | added µs | ratio | final loss |")
    print(f"|{'-' * 32}|----------:|---------:|------:|-----------:|")
    for name, row in table.items():
        print(
            f"| {name:30} | {row['us_per_step']:9.1f} | {row['added_us']:8.1f} | "
            f"{row['ratio']:5.2f} | {row['loss']:10.6f} |"
        )
    spread = {f"{row['loss']:.6f}" for row in table.values()}
    print("final losses agree" if len(spread) == 1 else f"FINAL LOSSES DIFFER: {sorted(spread)}")


if __name__ == "__main__":
    main()
