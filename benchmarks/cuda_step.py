"""Time of a train step on a CUDA device, beside the same step written by hand on torch.

    python benchmarks/cuda_step.py                     # on the machine's first device
    python benchmarks/cuda_step.py --device cpu --quick  # to see that it runs

For each precision and option it trains a transformer encoder on tokens, in two ways that take turns
in small blocks: by hand (autocast, scaler, clipping, fused AdamW as the option says), and by a
strategy of drivetrain. It prints microseconds a step, tokens a second, peak memory, and the ratio,
which is to be at most 1.02. Nobody has run it on a GPU yet; figures go to docs/verified.md with the
device, the driver, the version of torch and this command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from drivetrain_interfaces import Clip, StepSpec, StrategyContext, World
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.strategies import SingleDeviceStrategy
from drivetrain_toolkit.tuned import Tuned
from torch import nn

CLIP = 1.0
TARGET = 1.02


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    blocks: int


FULL = Sizes(12, 768, 12, 32_000, 512, 16, 10, 8)
QUICK = Sizes(1, 32, 2, 64, 8, 4, 3, 2)


class Encoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        layer = nn.TransformerEncoderLayer(
            sizes.width,
            sizes.heads,
            4 * sizes.width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.body = nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


def loss_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    logits = module(batch[0])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def host_batches(sizes: Sizes, *, pinned: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, sizes.length)
    made = []
    for _ in range(sizes.steps):
        pair = [torch.randint(0, sizes.vocabulary, shape, generator=generator) for _ in range(2)]
        made.append(tuple(t.pin_memory() for t in pair) if pinned else tuple(pair))
    return made


class ByHand:
    """What a careful person writes."""

    def __init__(self, sizes, device, precision, *, compiled, fused):
        torch.manual_seed(1)
        self.device = device
        self.module = Encoder(sizes).to(device)
        self.adam = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=fused or None)
        self.loss = torch.compile(loss_of) if compiled else loss_of
        self.dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        scaled = precision == "16-mixed"
        self.scaler = torch.amp.GradScaler(device.type) if scaled else None

    def step(self, batch):
        batch = [t.to(self.device, non_blocking=True) for t in batch]
        context = (
            nullcontext()
            if self.dtype is None
            else torch.autocast(self.device.type, dtype=self.dtype)
        )
        with context:
            loss = self.loss(self.module, batch)
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.adam)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        if self.scaler is None:
            self.adam.step()
        else:
            self.scaler.step(self.adam)
            self.scaler.update()
        self.adam.zero_grad(set_to_none=True)


class ByStrategy:
    """The same by drivetrain."""

    def __init__(self, sizes, device, precision, *, compiled, fused):
        torch.manual_seed(1)
        options = CompileOptions() if compiled else None
        context = StrategyContext(
            accelerator_for(device),
            device.index or 0,
            World(),
            LocalCollectives(),
            make_precision(precision, device.type),
        )
        self.strategy = Tuned(SingleDeviceStrategy(), compile=options, fused=fused)(context)
        self.module = self.strategy.prepare(Encoder(sizes))
        adam = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.run = self.strategy.train_step(StepSpec(self.module, [adam], loss_of, clip=Clip(CLIP)))

    def step(self, batch):
        self.run((self.strategy.feed(batch),))


def accelerator_for(device):
    if device.type == "cuda":
        from drivetrain_cuda.accelerator import CudaAccelerator

        return CudaAccelerator()
    from drivetrain_cpu.accelerator import CpuAccelerator

    return CpuAccelerator()


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block(way, batches, device):
    """Seconds a step over one block."""
    wait(device)
    start = time.perf_counter()
    for batch in batches:
        way.step(batch)
    wait(device)
    return (time.perf_counter() - start) / len(batches)


def compare(sizes, device, precision, *, compiled, fused):
    batches = host_batches(sizes, pinned=device.type == "cuda")
    found, peaks = {}, {}
    ways = {}
    for name, kind in (("by hand", ByHand), ("drivetrain", ByStrategy)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ways[name] = kind(sizes, device, precision, compiled=compiled, fused=fused)
        for _ in range(2):
            block(ways[name], batches, device)  # warms up, and compiles
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device)
        found[name] = []
    for number in range(sizes.blocks):
        order = list(ways) if number % 2 else list(reversed(ways))
        for name in order:
            found[name].append(block(ways[name], batches, device))
    times = {name: statistics.median(values) for name, values in found.items()}
    pairs = zip(found["drivetrain"], found["by hand"], strict=True)
    return {
        "precision": precision,
        "compiled": compiled,
        "fused": fused,
        "us": {name: round(1e6 * value) for name, value in times.items()},
        "tokens_per_s": round(sizes.batch * sizes.length / times["drivetrain"]),
        "peak_bytes_after_both_are_there": peaks,
        "ratio": round(statistics.median(mine / other for mine, other in pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed", "16-mixed"])
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--tf32", action="store_true", help="let float32 products round to TF32")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device. Use --device cpu --quick to see that it runs.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if asked.tf32:
        torch.set_float32_matmul_precision("high")
    sizes = QUICK if asked.quick else FULL
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {sizes}")
    worst = 0.0
    for precision in asked.precisions:
        for compiled in (False, True) if asked.compile else (False,):
            for fused in (False, True):
                row = compare(sizes, device, precision, compiled=compiled, fused=fused)
                worst = max(worst, row["ratio"])
                print(json.dumps(row), flush=True)
    print(f"largest ratio {worst:.3f}, to be at most {TARGET}")


if __name__ == "__main__":
    main()
