"""One rank fails before it reaches the fit: while the script is imported, or in a set-up hook.

Arguments: the launcher, the place (``top`` or ``setup``), and the folder for files.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from drivetrain import Trainer
from training_parts import Regression, loader

LAUNCHER, PLACE, FOLDER = sys.argv[1:]
if PLACE == "top" and os.environ.get("RANK") == "1":
    print("here 1", os.getpid(), flush=True)
    raise LookupError("rank 1 has no data")


class Picky(Regression):
    def setup(self, stage: str) -> None:
        if self.trainer.world.rank == 1:
            print("here 1", os.getpid(), flush=True)
            raise LookupError("rank 1 has no data")

    def teardown(self, stage: str) -> None:
        print("teardown", self.trainer.world.rank, flush=True)


def main() -> None:
    kind: Any = Picky if PLACE == "setup" else Regression
    Trainer(
        accelerator="cpu",
        devices=2,
        launcher=LAUNCHER,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(kind(), loader())


if __name__ == "__main__":
    main()
