"""Fit with each strategy on two ranks, started by the launcher that is named; rank 0 says how.

python launch_strategies.py LAUNCHER
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from drivetrain import FunctionalModule, Trainer, seed_everything
from drivetrain_toolkit import strategies
from torch import nn

MADE = {
    "ddp": lambda: "ddp",
    "ddp2": lambda: "ddp2",
    "fsdp": lambda: strategies.FSDPStrategy(wrap=["model.2"]),
    "pipeline": lambda: strategies.PipelineStrategy(module="model", microbatches=2),
    "rpc": lambda: "rpc",
    "tp": lambda: strategies.TensorParallelStrategy(
        plan={"model.0": "colwise", "model.2": "rowwise"}
    ),
    "zero1": lambda: "zero1",
    "zero2": lambda: strategies.Zero2Strategy(wrap=["model.2"]),
}


def mean_square(net: nn.Module, batch: Any) -> torch.Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """At the top of the file, since ``spawn`` sends it to new processes."""
    return torch.optim.AdamW(parameters, lr=0.05)


def off(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"off": mean_square(net, batch)}


def main() -> None:
    launcher = sys.argv[1]
    for name, make in MADE.items():
        seed_everything(5)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        model = FunctionalModule(
            net,
            training_step=mean_square,
            optimizer=adamw,
            validation_step=off,
        )
        data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randn(16, 2))
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=make(),
            launcher=launcher,
            max_epochs=3,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        trainer.fit(model, loader, loader)
        if trainer.is_global_zero:
            said = json.dumps([trainer.global_step, float(trainer.callback_metrics["off"])])
            print("FIT", name, said.replace(" ", ""), flush=True)


if __name__ == "__main__":
    main()
