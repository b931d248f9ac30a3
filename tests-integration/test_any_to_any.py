"""Saved on some ranks with one strategy, loaded on others with another: the same run.

``nox -s any_to_any`` does it for every pair, four ranks and the simulated accelerator included.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import any_to_any

if TYPE_CHECKING:
    from conftest import Starter


def test_a_checkpoint_of_one_strategy_is_loaded_by_others(start: Starter) -> None:
    around = ["single@1", "fsdp@2", "zero1@2", "pipeline@2", "ddp@2", "single@1"]
    pairs = [f"{source}:{target}" for source, target in pairwise(around)]
    running = start("any_to_any.py", str(start.folder / "saved"), *pairs)
    assert running.finish(within=300.0) == 0, running.output
    assert running.lines[-1].startswith("5 of 5 pairs"), running.output


def test_the_page_of_pairs_is_of_all_of_them() -> None:
    page = Path(__file__).parents[1].joinpath("docs/any-to-any.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"| `{place}`" for place in any_to_any.PLACES]
    assert all(row[1:] == [*["equal"] * (len(rows) - 1), "equal |"] for row in rows)
