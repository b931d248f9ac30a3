"""Fit as the JSON in the first argument says; every rank notes what happens.

Keys: ``out`` (a folder), ``model``, ``data``, ``trainer``, ``checkpoint`` (arguments of
``ModelCheckpoint``, or null for none), ``at`` (lists of arguments of ``At``), ``resume``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from drivetrain import Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from training_parts import At, Recorder, Regression, loader, parameters_of


def main() -> None:
    asked = json.loads(sys.argv[1])
    seed_everything(asked.get("seed", 7))
    callbacks = [Recorder(asked["out"]), *(At(*each) for each in asked.get("at", ()))]
    if asked.get("checkpoint") is not None:
        callbacks.append(ModelCheckpoint(**asked["checkpoint"]))
    settings = {"devices": 1, "accelerator": "cpu", "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "log_every_n_steps": 4}
    trainer = Trainer(**{**settings, **asked.get("trainer", {})}, callbacks=callbacks)
    model = Regression(**asked.get("model", {}))
    data = asked.get("data", {})
    trainer.fit(model, loader(**data), loader(16, shuffle=False), ckpt_path=asked.get("resume"))
    if trainer.is_global_zero:
        done = {
            "parameters": parameters_of(model),
            "metrics": {key: float(value).hex() for key, value in trainer.callback_metrics.items()},
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
        }
        Path(asked["out"], "done.json").write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main()
