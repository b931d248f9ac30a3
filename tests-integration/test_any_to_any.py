"""Saved on some ranks with one strategy, loaded on others with another: the same run.

``nox -s any_to_any`` does it for every pair, four ranks and the simulated accelerator included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Starter


def test_a_checkpoint_of_one_strategy_is_loaded_by_others(start: Starter) -> None:
    pairs = ["single@1:fsdp@2", "fsdp@2:zero1@2", "zero1@2:ddp@2", "ddp@2:single@1"]
    running = start("any_to_any.py", str(start.folder / "saved"), *pairs)
    assert running.finish(within=300.0) == 0, running.output
    assert running.lines[-1].startswith("4 of 4 pairs"), running.output
