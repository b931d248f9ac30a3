"""Which strategy does what: writes ``docs/strategy-table.md``.

It is made from what the strategies declare, and from what came out when all combinations of
accumulation, clipping and precision were run, which
``tests-integration/scripts/strategy_matrix.py --write`` keeps. ``python ci/strategy_table.py``
compares, ``--write`` writes. Needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from drivetrain_interfaces.capabilities import Feature, StepHook
from drivetrain_toolkit import specs

PAGE = Path(__file__).parents[1] / "docs/strategy-table.md"
RECORD = PAGE.parent / "strategy-matrix.json"
FEATURES = (
    Feature.ACCUMULATION,
    Feature.CLIP_NORM,
    Feature.CLIP_VALUE,
    Feature.CLOSURE,
    Feature.SEVERAL_OPTIMIZERS,
    Feature.MANUAL_STEP,
    Feature.SEVERAL_PROCESSES,
)
HEAD = """# What each strategy can do

Written by `ci/strategy_table.py` from what the strategies declare, and from runs. "Refused" means
by name, when it is asked for. A run has what both its strategy and its backend have.
"""
RUNS = """
## Combinations that ran

`nox -s strategies` trains with every accumulation (1 and 3 microbatches, with a shorter last
window), clipping (none, by norm, by value) and precision for 20 updates on two CPU processes over
gloo; `dp` on two devices of one process, `single_device` on one. Each is equal to a loop by hand in
float64 on one process with all the data, within the tolerance of
[the conformance kit](conformance.md) for its precision, or refused by name. CI runs a part of them.
"""


def page() -> str:
    """The text of the page."""
    rows = {"ddp": (specs.DDP_FEATURES, specs.PRECISIONS, frozenset(StepHook))}
    rows |= {
        name: (can.features, can.precisions, can.hooks) for name, can in specs.CAPABILITIES.items()
    }
    names = sorted({precision for _, precisions, _ in rows.values() for precision in precisions})
    lines = [HEAD, "## Abilities", ""]
    lines += _table(
        [feature.value for feature in FEATURES],
        {name: [feature in row[0] for feature in FEATURES] for name, row in rows.items()},
    )
    lines += ["", "## Precisions", ""]
    lines += _table(names, {name: [p in row[1] for p in names] for name, row in rows.items()})
    lines += ["", "## Hooks inside a step", ""]
    lines += _table(
        [hook.value for hook in StepHook],
        {name: [hook in row[2] for hook in StepHook] for name, row in rows.items()},
    )
    return "\n".join(lines) + "\n" + RUNS + "\n".join(["", *_runs()]) + "\n"


def _runs() -> list[str]:
    kept: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = ["| strategy | equal | refused |", "|---|---:|---:|"]
    lines += [f"| `{n}` | {each['equal']} | {len(each['refused'])} |" for n, each in kept.items()]
    ways = len({(c["accumulation"], c["clipping"]) for e in kept.values() for c in e["refused"]})
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, each in kept.items():
        by_precision: dict[tuple[str, str], list[str]] = {}
        for cell in each["refused"]:
            way = f"accumulation {cell['accumulation']}, clipping {cell['clipping']}"
            by_precision.setdefault((cell["precision"], cell["why"]), []).append(way)
        for (precision, why), found in by_precision.items():
            which = "all" if len(found) == ways else "; ".join(found)
            alike.setdefault((precision, which, why), []).append(name)
    lines += ["", "| refused | in | what it says | strategies |", "|---|---|---|---|"]
    for (precision, which, why), names in alike.items():
        who = "all" if len(names) == len(kept) else ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {precision} | {which} | {why} | {who} |")
    return lines


def _table(columns: list[str], rows: dict[str, list[bool]]) -> list[str]:
    lines = [f"| strategy | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, cells in sorted(rows.items()):
        marks = " | ".join("yes" if cell else "refused" for cell in cells)
        lines.append(f"| `{name}` | {marks} |")
    return lines


def main() -> None:
    """Compare, or write."""
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit("docs/strategy-table.md is not what strategies declare and do: --write it")


if __name__ == "__main__":
    main()
