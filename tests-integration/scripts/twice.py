"""Two fits on two ranks by the launcher of the first argument, and what this process has then."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from drivetrain import Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from training_parts import Regression, loader, parameters_of

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "logger": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def main() -> None:
    seed_everything(3)
    model = Regression("sgd")
    keeper = ModelCheckpoint(every_n_epochs=1)
    trainer = Trainer(
        **QUIET, launcher=sys.argv[1], max_epochs=1, callbacks=[keeper], default_root_dir="."
    )
    found: list[Any] = []
    for _ in range(2):
        trainer.fit(model, loader(), loader(16, shuffle=False))
        found.append([trainer.global_step, trainer.current_epoch, parameters_of(model)])
        found.append([dict(trainer.callback_metrics), trainer.world.rank, trainer.world.size])
    if trainer.world.is_main:
        os.write(1, f"FOUND {json.dumps(found)}\n".encode())  # in one piece, beside other ranks


if __name__ == "__main__":
    main()
