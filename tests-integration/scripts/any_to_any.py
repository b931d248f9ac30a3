"""Save on some ranks with one strategy, load on others with another, and go on.

``python any_to_any.py FOLDER [FROM:TO …]`` with places such as ``single@1``, ``ddp@2``, ``fsdp@4``
or ``sim@1`` (the simulated accelerator, in a process of its own); without pairs, all of them, of
which a page is written to ``--table FILE``. For each pair the weights and optimizer states that
arrive must be those that were saved, bit for bit, and the weights in the end those of an
undisturbed run on one CPU, but for rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, Module, Trainer, seed_everything
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.strategies.tensor_parallel import TensorParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PLACES = (
    "single@1", "ddp@2", "ddp@4", "zero1@2", "zero1@4", "fsdp@2", "fsdp@4", "tp@2", "pipeline@2",
    "sim@1",
)  # fmt: skip
#: Those that need to be told something.
STRATEGIES = {"tp": TensorParallelStrategy(plan={"net.0": "colwise", "net.2": "rowwise"})}
SIMULATED = Path(__file__).parents[2] / "packages/conformance/tests"
#: Samples per step of all ranks, samples, epochs, and the step after which is saved.
ROUND, SIZE, EPOCHS, MIDDLE = 16, 64, 2, 6
PATIENCE = 100.0


class Net(Module):
    """Small, with a buffer, and parameters most of whose sizes the ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)
        )
        self.register_buffer("scale", torch.tensor(2.0))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]) * self.scale, batch[1])

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
        several = {"strategy": STRATEGIES.get(strategy, strategy), "launcher": "fork"}
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


def table(found: dict[tuple[str, str], str], seconds: float) -> str:
    """A page with what was seen: a row for each place that saved."""
    good = sum(not problem for problem in found.values())
    about = (
        f"What `nox -s any_to_any` has written: {good} of {len(found)} pairs went on as if nothing "
        f"had changed, on {time.strftime('%Y-%m-%d')} with torch {torch.__version__} in "
        f"{seconds:.0f} s. All ran on CPUs; `sim` is the simulated accelerator. After `@` is the "
        "number of ranks. *Equal* means that weights and optimizer states arrived bit for bit, and "
        "that the run ended where an undisturbed one ends, but for rounding."
    )
    head = f"| saved on | {' | '.join(f'to {place}' for place in PLACES)} |"
    lines = ["# Saved here, loaded there", "", about, "", head, f"|---|{'---|' * len(PLACES)}"]
    for source in PLACES:
        cells = (found[source, target] or "equal" for target in PLACES)
        lines.append(f"| `{source}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1] == "--run":
        place, saved, resume = sys.argv[2:]
        run(place, Path(saved), Path(resume) if resume else None)
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", nargs="*")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    pairs = [tuple(pair.split(":")) for pair in options.pairs]
    pairs = pairs or [(source, target) for source in PLACES for target in PLACES]
    begin = time.monotonic()
    run("single@1", folder / "single@1.ckpt", None)
    found: dict[tuple[str, str], str] = {}
    for source, target in pairs:
        found[source, target] = problem = judge(folder, source, target)
        print(f"{source:8} -> {target:8} {problem or 'equal'}", flush=True)
    seconds = time.monotonic() - begin
    wrong = sum(map(bool, found.values()))
    good = len(pairs) - wrong
    print(f"{good} of {len(pairs)} pairs went on as if nothing had changed; {seconds:.0f} s")
    if options.table is not None and not options.pairs:
        options.table.write_text(table(found, seconds), encoding="utf-8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
