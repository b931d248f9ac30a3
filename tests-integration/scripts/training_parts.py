"""A small model, its data, and callbacks that write down what happens. Shared by the scripts."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, DataModule, Module
from torch import nn
from torch.utils.data import DataLoader, Dataset

#: Longer than any test.
ENDLESS_SECONDS = 100_000


class Samples(Dataset):
    """Numbered samples: eight features, one target, and the number."""

    def __init__(self, size: int = 48) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(size, 8, generator=generator)
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.x[index], self.y[index], index


class Regression(Module):
    """A small network with dropout that logs means of epochs.

    Args:
        optimizer: ``"adamw"`` with OneCycleLR, or ``"sgd"``.
        total_steps: The length of the schedule.
        dropout: The rate.
        width: Hidden units.
    """

    def __init__(
        self,
        optimizer: str = "adamw",
        total_steps: int = 64,
        dropout: float = 0.25,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, _ = batch
        loss = nn.functional.mse_loss(self.net(x).float(), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("size", len(x), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x).float(), y))

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=5e-2, total_steps=self.hparams["total_steps"]
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Data(DataModule):
    """The loaders of ``loader``, for the command line."""

    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader(16, shuffle=False)


class Recorder(Callback):
    """Appends what happens to ``events-<rank>.jsonl``; numbers as hexadecimal floats.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.batches_seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches_seen": self.batches_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches_seen = state["batches_seen"]

    def note(self, trainer: Any, event: str, **fields: Any) -> None:
        row = {"event": event, "epoch": trainer.current_epoch, "step": trainer.global_step}
        path = Path(self.folder, f"events-{trainer.world.rank}.jsonl")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **fields}) + "\n")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.note(trainer, "train_start", batches_seen=self.batches_seen)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.note(trainer, "epoch_start")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches_seen += 1
        self.note(
            trainer,
            "batch",
            batch_idx=batch_idx,
            loss=float(outputs["loss"]).hex(),
            samples=batch[2].tolist(),
            lr=float(trainer.optimizers[0].param_groups[0]["lr"]).hex(),
        )

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.note(trainer, "validation_end", val_loss=_hex(trainer, "val_loss"))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.note(
            trainer, "epoch_end", loss=_hex(trainer, "loss_epoch"), size=_hex(trainer, "size")
        )

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.note(trainer, "train_end")

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self.note(trainer, "fit_end")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.note(trainer, "teardown", stage=stage)


def _hex(trainer: Any, name: str) -> str:
    return float(trainer.callback_metrics[name]).hex()


class At(Callback):
    """Does something when a rank is about to train on a certain batch.

    Args:
        what: It always prints ``here RANK PID``, and at the start ``port PORT``. Then ``"say"``
            goes on; ``"wait"`` prints ``woke RANK PID`` after each signal and never goes on;
            ``"hang"`` sleeps for ever; ``"raise"`` raises; ``"memory"`` takes more than its process
            may have; ``"group-memory"`` takes more than the control group ``TEST_MEMORY_GROUP`` may
            have; ``"exit"`` leaves with code 3; ``"kill"`` kills the process.
        rank: The rank; None means every rank.
        epoch: The epoch.
        batch: The number of the batch.
    """

    def __init__(self, what: str, rank: int | None = None, epoch: int = 0, batch: int = 0) -> None:
        self.what = what
        self.rank = rank
        self.place = (epoch, batch)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        _say(f"port {trainer.world.port}")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        rank = trainer.world.rank
        if self.rank not in (None, rank) or self.place != (trainer.current_epoch, batch_idx):
            return
        if self.what == "wait":
            # A pipe keeps a signal that comes before anybody waits for it; pause() would lose it.
            woken, wakes = os.pipe()
            os.set_blocking(wakes, False)
            signal.set_wakeup_fd(wakes)
        _say(f"here {rank} {os.getpid()}")
        while self.what == "wait":
            os.read(woken, 1)
            _say(f"woke {rank} {os.getpid()}")
        if self.what == "hang":
            time.sleep(ENDLESS_SECONDS)
        if self.what == "memory":
            _run_out_of_memory()
        if self.what == "group-memory":
            Path(os.environ["TEST_MEMORY_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
            torch.ones(1 << 30, dtype=torch.uint8)  # the kernel kills this process for it
        if self.what == "raise":
            raise LookupError(f"rank {rank} lost its way")
        if self.what == "exit":
            os._exit(3)
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def _run_out_of_memory() -> None:
    """For real: the kernel refuses it to this process, and to no other."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
    torch.empty(1 << 30, dtype=torch.uint8)


def _say(line: str) -> None:
    """Print a line in one piece, as other ranks print to the same pipe."""
    os.write(1, f"{line}\n".encode())


def loader(
    samples: int = 48, batch: int = 4, *, shuffle: bool = True, workers: int = 0
) -> DataLoader:
    return DataLoader(Samples(samples), batch, shuffle=shuffle, num_workers=workers)


def parameters_of(module: nn.Module) -> dict[str, list[str]]:
    """All parameters as hexadecimal floats."""
    return {
        name: [float(value).hex() for value in tensor.flatten().double().tolist()]
        for name, tensor in module.state_dict().items()
    }
