"""Train a small model with Lightning and save at every step: ``lightning_run.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def optimizers(module: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Theirs(lightning.LightningModule):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return optimizers(self)


class Losses(lightning.Callback):
    def __init__(self) -> None:
        self.rows: list[list[Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.rows.append([trainer.global_step, float(outputs["loss"]).hex()])


def main() -> None:
    folder, losses = Path(sys.argv[1]), Losses()
    steps = ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(
        folder / "epochs", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    validations = ModelCheckpoint(
        folder / "validations", "{epoch}", monitor="val_loss", save_top_k=-1,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[losses, steps, epochs, validations],
        default_root_dir=folder,
    )
    trainer.fit(Theirs(), batches(), batches())
    (folder / "losses.json").write_text(json.dumps(losses.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
