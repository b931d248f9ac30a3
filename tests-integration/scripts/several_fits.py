"""Two fits by one Trainer and one by another, with evaluations between them, on two ranks.

Every rank writes what it saw to ``several-<rank>.json`` in the folder of the first argument.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from drivetrain import Trainer, seed_everything
from training_parts import Regression, loader, parameters_of

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "logger": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def main() -> None:
    seed_everything(3)
    model = Regression("sgd")
    found: dict[str, Any] = {"pid": os.getpid()}
    first = Trainer(**QUIET, max_epochs=1)
    first.fit(model, loader())
    found["after one fit"] = [first.global_step, parameters_of(model)]
    found["validated"] = first.validate(model, loader(16, shuffle=False))
    first.fit(model, loader())
    found["after two fits"] = [first.global_step, parameters_of(model)]
    second = Trainer(**QUIET, max_epochs=2)
    second.fit(model, loader(), loader(16, shuffle=False))
    found["after three fits"] = [second.global_step, parameters_of(model)]
    found["metrics"] = second.callback_metrics
    found["world"] = [second.world.rank, second.world.size]
    path = Path(sys.argv[1], f"several-{second.world.rank}.json")
    path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
