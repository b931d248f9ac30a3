"""Train a convolutional classifier on scikit-learn's handwritten digits.

python examples/digits.py                          two CPU processes
python examples/digits.py --devices 1              one
python examples/digits.py --resume CHECKPOINT      go on from a checkpoint
python examples/digits.py --accelerator auto       whatever backend is installed
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import drivetrain
import torch
from drivetrain.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(drivetrain.DataModule):
    """1,797 images of 8 × 8 pixels; a fifth of them is kept for validation."""

    def __init__(self, batch_size: int = 32) -> None:
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        parts = train_test_split(x, y, test_size=0.2, random_state=0, stratify=labels)
        self.train = TensorDataset(parts[0], parts[2])
        self.val = TensorDataset(parts[1], parts[3])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 128)


class Classifier(drivetrain.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        correct = (self(x).argmax(1) == y).float().mean()
        self.log("val_accuracy", correct, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.85)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main() -> None:
    """Train, and say how well, where the checkpoint is and how to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--run-dir", default="runs/digits")
    parser.add_argument("--resume", metavar="CHECKPOINT")
    options = parser.parse_args()

    drivetrain.seed_everything(7)
    best = ModelCheckpoint(monitor="val_accuracy", mode="max")
    trainer = drivetrain.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,
        max_epochs=options.epochs,
        default_root_dir=options.run_dir,
        callbacks=[best],
        log_every_n_steps=10,
    )
    trainer.fit(Classifier(), datamodule=Digits(), ckpt_path=options.resume)

    if trainer.is_global_zero:
        print(f"\nvalidation accuracy  {trainer.callback_metrics['val_accuracy']:.4f}")
        print(f"best checkpoint      {best.best_model_path}")
        print(f"trained for          {trainer.elapsed:.1f} s")
        print(
            f"to go on from there  {sys.executable} {' '.join(sys.argv[:1])} "
            f"--resume '{best.best_model_path}' --epochs {2 * options.epochs}"
        )
        print(f"\nthe plan it ran on:\n{trainer.plan.explain()}")


if __name__ == "__main__":
    main()
