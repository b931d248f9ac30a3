"""Which strategy does what: writes ``docs/strategy-table.md`` from what the strategies declare.

``python ci/strategy_table.py`` compares, ``--write`` writes. Needs no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from drivetrain_interfaces.capabilities import Feature, StepHook
from drivetrain_toolkit import specs

PAGE = Path(__file__).parents[1] / "docs/strategy-table.md"
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

Written by `ci/strategy_table.py` from what the strategies declare. "Refused" means by name, when
it is asked for. A run has what both its strategy and its backend have.
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
    return "\n".join(lines) + "\n"


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
        raise SystemExit("docs/strategy-table.md is not what strategies declare: --write it")


if __name__ == "__main__":
    main()
