"""A run that takes its time, saves when it is told to stop, and goes on when it is started again.

Arguments: a folder, and the action of SIGUSR1. Rank 0 writes the loss of each step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain import Callback, Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from training_parts import Regression, loader

FOLDER = Path(sys.argv[1])


class Telling(Callback):
    """Writes ``step loss`` for each step, and how the run ended."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world.is_main:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            with (FOLDER / "losses.txt").open("a") as file:
                file.write(f"{trainer.global_step} {float(torch.as_tensor(loss)).hex()}\n")
        time.sleep(0.2)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        if trainer.world.is_main:
            with (FOLDER / "ends.txt").open("a") as file:
                file.write(f"{trainer.interrupted}\n")


seed_everything(3)
trainer = Trainer(
    accelerator="cpu",
    max_epochs=8,
    callbacks=[Telling(), ModelCheckpoint(dirpath=str(FOLDER / "kept"))],
    signals={"SIGUSR1": sys.argv[2]},
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=str(FOLDER),
)
trainer.fit(Regression("sgd"), loader(), ckpt_path="last")
