"""What the processes of ``elastic.py`` wrote, put together."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def survived(folder: Path) -> tuple[list[tuple[int, int]], dict[int, Counter[int]]]:
    """The generations, and how often each sample of each epoch counts.

    A generation's steps beyond the checkpoint that the next one began from were undone.

    Returns:
        (start step, world size) of each generation in order; counts of samples by epoch.
    """
    rows = defaultdict(list)
    about = {}
    for path in folder.glob("seen-*.jsonl"):
        lines = path.read_text().split("\n")[:-1]
        if not lines:
            continue
        head, *steps = map(json.loads, lines)
        about[head["generation"]] = (head["start"], head["size"])
        rows[head["generation"]] += steps
    generations = sorted(about)
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for index, generation in enumerate(generations):
        later = [about[each][0] for each in generations[index + 1 :]]
        for row in rows[generation]:
            if row["step"] <= min(later, default=row["step"]):
                counts[row["epoch"]].update(row["samples"])
    return [about[each] for each in generations], counts
