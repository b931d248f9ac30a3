"""How long it takes until the first step is done, with 1, 2 and 4 processes on the CPU.

Two scripts train the same network. One is hand-written DDP, started by torchrun. The other calls
``fit``, is started by python, and starts its other ranks itself. Both are measured from the command
to the end of rank 0's first step, taking turns, fresh processes each time; what counts is the
fastest of all rounds. Of the second also from ``fit`` on. The packages are compiled first, as pip
does with what it installs; it does not with the editable packages of this tree, nor does Python
where it is told to write no bytecode.

    python -m nox -s benchmarks -- launch
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import subprocess
import sys
import tempfile
import time

HAND_WRITTEN = """
import os, time, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
several = int(os.environ["WORLD_SIZE"]) > 1
if several:
    dist.init_process_group("gloo")
    net = DistributedDataParallel(net)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
inputs, targets = torch.randn(64, 256), torch.randint(0, 10, (64,))
loss = nn.functional.cross_entropy(net(inputs), targets)
loss.backward()
optimizer.step()
if int(os.environ["RANK"]) == 0:
    print("STEP", time.time(), flush=True)
if several:
    dist.destroy_process_group()
"""

OURS = """
import sys, time, torch
from torch import nn
from drivetrain import Callback, Module, Trainer

class Net(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Telling(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.world.is_main:
            print("STEP", time.time(), flush=True)

torch.manual_seed(0)
trainer = Trainer(
    accelerator="cpu", devices=int(sys.argv[1]), max_steps=1, callbacks=[Telling()], logger=False,
    enable_progress_bar=False, enable_model_summary=False,
)
batches = [(torch.randn(64, 256), torch.randint(0, 10, (64,)))]
print("FIT", time.time(), flush=True)
trainer.fit(Net(), batches)
"""


def run(command: list[str], folder: str) -> dict[str, float]:
    """Seconds from the start of a command to each of the marks that it prints first."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.time()
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=True
    )
    marks: dict[str, float] = {}
    for line in done.stdout.splitlines():
        name, _, text = line.partition(" ")
        if name in ("FIT", "STEP"):
            marks.setdefault(name, float(text) - started)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    for name in ("drivetrain_interfaces", "drivetrain_toolkit", "drivetrain_cpu", "drivetrain"):
        (folder,) = importlib.import_module(name).__path__
        compileall.compile_dir(folder, quiet=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("hand.py", HAND_WRITTEN), ("ours.py", OURS)):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        print("| ranks | torchrun, hand-written DDP, s | drivetrain, s | ratio | from `fit`, s |")
        print("|---:|---:|---:|---:|---:|")
        for size in asked.sizes:
            theirs, ours = [], []
            for _ in range(asked.rounds):
                theirs.append(run([*torchrun, str(size), "hand.py"], folder))
                ours.append(run([sys.executable, "ours.py", str(size)], folder))
            hand = min(each["STEP"] for each in theirs)
            mine = min(each["STEP"] for each in ours)
            fit = min(each["STEP"] - each["FIT"] for each in ours)
            row = f"| {size} | {hand:.2f} | {mine:.2f} | {mine / hand:.2f} | {fit:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
