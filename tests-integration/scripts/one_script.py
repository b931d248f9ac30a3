"""One training script for every accelerator: ``one_script.py ACCELERATOR [OPTIONS]``.

OPTIONS is a JSON object: ``batch_size`` and ``shuffle`` are the loader's, ``resume`` is a
checkpoint to go on from, and the rest are the trainer's. The first process prints what came of it
as JSON: the losses of its steps, the sum of the parameters, what was logged, and the steps.
"""

from __future__ import annotations

import json
import sys

import torch
from drivetrain import Module, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)
        )

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", (self.net(batch[0]) - batch[1]).square().mean())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def main(accelerator, batch_size=8, shuffle=True, resume=None, **options) -> None:
    seed_everything(1)
    features = torch.randn(64, 4)
    data = TensorDataset(features, features.sum(1, keepdim=True))
    net = Net()
    trainer = Trainer(
        accelerator=accelerator,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    training = DataLoader(data, batch_size=batch_size, shuffle=shuffle)
    trainer.fit(net, training, DataLoader(data, batch_size=batch_size), ckpt_path=resume)
    if trainer.is_global_zero:
        found = {
            "losses": net.losses,
            "total": sum(float(p.detach().cpu().double().abs().sum()) for p in net.parameters()),
            "told": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "steps": trainer.global_step,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2] if sys.argv[2:] else "{}"))
