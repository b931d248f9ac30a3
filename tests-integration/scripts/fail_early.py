"""The second rank fails before it reaches the fit."""

from __future__ import annotations

import os

from drivetrain import Trainer
from training_parts import Regression, loader

if os.environ.get("RANK") == "1":
    print("here 1", os.getpid(), flush=True)
    raise LookupError("rank 1 has no data")

Trainer(accelerator="cpu", devices=2, max_epochs=1, enable_progress_bar=False).fit(
    Regression(), loader()
)
