"""One training script for every accelerator: ``one_script.py ACCELERATOR [DEVICES] [PRECISION]``.

Prints the losses of its steps, and the parameters' sum at the end, as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from drivetrain import Module, Trainer
from torch.utils.data import DataLoader, TensorDataset


class Small(Module):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch, batch_idx):
        features, target = batch
        return torch.nn.functional.mse_loss(self.net(features), target)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(loss.detach())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main(accelerator: str, devices: int, precision: str) -> None:
    torch.manual_seed(0)
    module = Small()
    features = torch.randn(64, 8)
    data = TensorDataset(features, features.sum(1, keepdim=True))
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        max_epochs=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))
    total = sum(float(p.detach().cpu().double().abs().sum()) for p in module.parameters())
    losses = [float(loss) for loss in module.losses]
    if trainer.is_global_zero:
        print(json.dumps({"losses": losses, "total": total}))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0], int(given[1]) if given[1:] else 1, given[2] if given[2:] else "32-true")
