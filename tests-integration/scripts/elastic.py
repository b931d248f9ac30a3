"""Train under torchrun with a changing number of machines, going on from the last checkpoint.

``elastic.py FOLDER EPOCHS``. Each process writes ``seen-<pid>.jsonl``: a row about its generation,
and one for each of its steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from drivetrain import Callback, Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from training_parts import Regression, loader

SAMPLES = 480
#: Slow enough that there is time to do harm in the middle, in seconds.
STEP = 0.05


class Seen(Callback):
    """Writes down what this process trains on."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"seen-{os.getpid()}.jsonl"

    def _write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        generation = trainer.collectives.broadcast_object(time.time())
        world = trainer.world
        self._write(generation=generation, start=trainer.global_step, size=world.size)
        line = f"begun {world.rank} {world.size} {os.getpid()} {trainer.global_step}\n"
        os.write(1, line.encode())

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write(
            epoch=trainer.current_epoch, step=trainer.global_step, samples=batch[2].tolist()
        )
        if trainer.global_step % 10 == 0:
            os.write(1, f"step {trainer.world.rank} {trainer.global_step}\n".encode())
        time.sleep(STEP)


def main() -> None:
    folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
    seed_everything(7)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        hang_timeout=8.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Seen(folder),
            ModelCheckpoint(dirpath=folder / "saved", every_n_train_steps=5, save_last=True),
        ],
        default_root_dir=folder,
    )
    trainer.fit(Regression("sgd"), loader(SAMPLES), ckpt_path="last")
    os.write(1, f"done {trainer.world.rank} {trainer.world.size}\n".encode())


if __name__ == "__main__":
    main()
