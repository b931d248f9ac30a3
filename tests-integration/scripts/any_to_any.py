"""Save on some ranks with one strategy, load on others with another, and go on.

``python any_to_any.py FOLDER [FROM:TO …]`` with places such as ``single@1``, ``ddp@2``, ``fsdp@4``
or ``sim@1`` (the simulated accelerator, in a process of its own); without pairs, all of them. For
each pair the weights and optimizer states that arrive must be those that were saved, bit for bit,
and the weights in the end those of an undisturbed run on one CPU, but for rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, Module, Trainer, seed_everything
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PLACES = (
    "single@1", "ddp@2", "ddp@4", "zero1@2", "zero1@4", "fsdp@2", "fsdp@4", "sim@1",
)  # fmt: skip
SIMULATED = Path(__file__).parents[2] / "packages/conformance/tests"
#: Samples per step of all ranks, samples, epochs, and the step after which is saved.
ROUND, SIZE, EPOCHS, MIDDLE = 16, 64, 2, 6
PATIENCE = 100.0


class Net(Module):
    """Small, with a buffer, and parameters whose sizes no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh())
        self.head = nn.Linear(3, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.head(self.net(batch[0])) * self.scale, batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Save(Callback):
    """Saves after a step, or as soon as training begins."""

    saves_checkpoints = True

    def __init__(self, path: Path, step: int | None) -> None:
        self.path = path
        self.step = step

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.step is None:
            trainer.save_checkpoint(self.path)

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Any) -> None:
        if moment.value == "step" and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(place: str, saved: Path, resume: Path | None) -> None:
    """Train on a place; saves to ``saved``, and the final weights beside it."""
    strategy, _, ranks = place.partition("@")
    if strategy == "sim" and os.environ.get("ANY_TO_ANY") != place:
        _run_apart(place, saved, resume)
        return
    accelerator: Any = "cpu"
    if strategy == "sim":
        from simulated_backend import spec

        accelerator, strategy = spec, "single"
    several: dict[str, Any] = {}
    if int(ranks) > 1:
        several = {"strategy": strategy, "launcher": "fork"}
    seed_everything(3)
    x = torch.randn(SIZE, 5)
    loader = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), ROUND // int(ranks))
    module = Net()
    trainer = Trainer(
        accelerator=accelerator,
        devices=int(ranks),
        max_epochs=EPOCHS,
        callbacks=[Save(saved, MIDDLE if resume is None else None)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **several,
    )
    trainer.fit(module, loader, ckpt_path=resume)
    weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    torch.save(weights, saved.with_suffix(".pt"))


def _run_apart(place: str, saved: Path, resume: Path | None) -> None:
    """In a process of its own, since torch learns of the device before it does anything else."""
    words = [sys.executable, __file__, "--run", place, str(saved), str(resume or "")]
    env = {**os.environ, "ANY_TO_ANY": place, "PYTHONPATH": str(SIMULATED)}
    done = subprocess.run(
        words, env=env, timeout=PATIENCE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def difference(first: Any, second: Any, where: str = "") -> str:
    """The first place at which two trees differ, or nothing."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return f"{where}: {sorted(map(str, first.keys() ^ second.keys()))}"
        found = (difference(first[key], second[key], f"{where}/{key}") for key in first)
        return next(filter(None, found), "")
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        pairs = zip(first, second, strict=True)
        found = (difference(*pair, f"{where}/{n}") for n, pair in enumerate(pairs))
        return next(filter(None, found), "")
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return "" if torch.equal(first, second) else where
    return "" if first == second else f"{where}: {first!r} and {second!r}"


def _state(path: Path) -> dict[str, Any]:
    tree = DirectoryCheckpointIO().load(str(path))
    for optimizer in tree["optimizers"]:
        for group in optimizer["groups"]:  # how it updates may depend on the device
            for choice in ("foreach", "fused", "capturable"):
                group.pop(choice, None)
    return {key: tree[key] for key in ("module", "optimizers", "schedulers")}


def judge(folder: Path, source: str, target: str) -> str:
    """What is wrong with a pair, or nothing."""
    saved, arrived = folder / f"{source}.ckpt", folder / f"{source}-{target}.ckpt"
    if not saved.exists():
        run(source, saved, None)
    run(target, arrived, saved)
    if place := difference(_state(saved), _state(arrived)):
        return f"arrived changed: {place}"
    end = torch.load(arrived.with_suffix(".pt"), weights_only=True)
    whole = torch.load(folder / "single@1.pt", weights_only=True)
    for name, value in whole.items():
        if not torch.allclose(end[name], value, rtol=1e-4, atol=1e-6):
            return f"{name} ended {(end[name] - value).abs().max().item():.2g} apart"
    return ""


def main() -> None:
    if sys.argv[1] == "--run":
        place, saved, resume = sys.argv[2:]
        run(place, Path(saved), Path(resume) if resume else None)
        return
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    pairs = [tuple(pair.split(":")) for pair in sys.argv[2:]]
    pairs = pairs or [(source, target) for source in PLACES for target in PLACES]
    begin, wrong = time.monotonic(), 0
    run("single@1", folder / "single@1.ckpt", None)
    for source, target in pairs:
        problem = judge(folder, source, target)
        wrong += bool(problem)
        print(f"{source:8} -> {target:8} {problem or 'equal'}", flush=True)
    good = len(pairs) - wrong
    print(f"{good} of {len(pairs)} pairs went on as if nothing had changed; "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
