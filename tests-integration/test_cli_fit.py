"""``drivetrain fit`` on two processes, from a file: trains, resumes, and says what is wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Starter

CONFIG = """
seed_everything: 7
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: {epochs}
  log_every_n_steps: 4
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {out}
  callbacks:
  - class_path: training_parts.Recorder
    init_args:
      folder: {out}
  - class_path: drivetrain.callbacks.ModelCheckpoint
    init_args:
      every_n_train_steps: 3
      save_top_k: -1
model:
  class_path: training_parts.Regression
  init_args:
    total_steps: 18
data:
  class_path: training_parts.Data
"""


def _config(start: Starter, out: str, epochs: int = 3) -> str:
    (start.folder / out).mkdir(exist_ok=True)
    path = start.folder / f"{out}.yaml"
    path.write_text(CONFIG.format(out=out, epochs=epochs))
    return path.name


def _batches(folder: Path, rank: int) -> list[dict[str, Any]]:
    text = (folder / f"events-{rank}.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if row["event"] in {"batch", "epoch_end", "validation_end"}]


def test_a_fit_on_two_processes_can_be_resumed_by_ckpt_path(start: Starter) -> None:
    whole = start.command("fit", "--config", _config(start, "whole"))
    assert whole.finish() == 0, whole.output
    saved = start.folder / "whole" / "checkpoints" / "epoch=1-step=9.ckpt"
    assert saved.exists()
    rest = start.command("fit", "--config", _config(start, "rest"), "--ckpt_path", str(saved))
    assert rest.finish() == 0, rest.output
    for rank in (0, 1):
        expected = _batches(start.folder / "whole", rank)
        found = _batches(start.folder / "rest", rank)
        assert found == [row for row in expected if row["step"] > 9]
        assert len([row for row in found if row["event"] == "batch"]) == 9


def test_settings_that_cannot_be_met_end_with_code_2_before_anything_is_written(
    start: Starter,
) -> None:
    words = ("--trainer.strategy", "dpp", "--trainer.launcher", "scrpt")
    running = start.command("fit", "--config", _config(start, "never"), *words)
    assert running.finish() == 2
    assert "'dpp'" in running.errors
    assert "'scrpt'" in running.errors
    assert "Traceback" not in running.errors
    assert list((start.folder / "never").iterdir()) == []
