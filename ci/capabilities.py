"""What each backend can do, as a page that is made from reports of the conformance kit.

A run of the kit leaves a report of all its tests. ``capabilities.py add build/reports/cpu.json``
keeps what it says in short in ``docs/reports``, also for a backend of another repository, and makes
``docs/capability-table.md``. Without arguments the page is compared with what is kept, and what is
kept with the reports of this tree's own sessions, where there are any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
KEPT = "docs/reports"
FRESH = "build/reports"
PAGE = "docs/capability-table.md"
COUNTED = ("passed", "skipped_by_declaration", "skipped_by_machine", "expected_failure")
HEAD = """# What each backend can do

This page is made by `python ci/capabilities.py` from reports of
[the conformance kit](conformance.md); do not edit it. Yes: it is declared and tested. No: it is not
declared, and tested to be refused. What was run on a real device, and what on something else, is in
[verified](verified.md).
"""


def digest(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says, without its tests and the machine that it was made on."""
    packages = report["environment"]["packages"]
    return {
        "backend": report["backend"],
        "strategy": report["strategy"],
        "verdict": report["verdict"],
        "level": report["level"],
        "contract": report["kit"]["contract"],
        "counts": {name: report["counts"][name] for name in COUNTED},
        "torch": packages.get("torch", "none").split("+")[0],
        "date": report["started"][:10],
    }


def title(kept: dict[str, Any]) -> str:
    """The name of a column."""
    strategy = kept["strategy"]
    return str(kept["backend"]["name"]) + (f" + {strategy['name']}" if strategy else "")


def declared(kept: dict[str, Any]) -> dict[str, list[str]]:
    """The abilities of the backend, or of the strategy that was tested on it."""
    source = kept["strategy"] or kept["backend"]
    return dict(source.get("capabilities") or kept["backend"]["capabilities"])


def table(kept: list[dict[str, Any]], ability: str) -> Iterator[str]:
    """Rows of one kind of ability, a column for each report."""
    yield f"\n## {ability.capitalize()}\n"
    yield "| | " + " | ".join(title(one) for one in kept) + " |"
    yield "|---|" + "---|" * len(kept)
    for name in sorted({name for one in kept for name in declared(one)[ability]}):
        marks = ("yes" if name in declared(one)[ability] else "no" for one in kept)
        yield f"| {name} | " + " | ".join(marks) + " |"


def page(kept: list[dict[str, Any]]) -> str:
    """The text of the page."""
    lines = [HEAD, "## Runs\n"]
    lines.append(
        "| backend | package | verdict | levels | contract | passed | does not apply "
        "| too few devices | expected to fail | torch | date |"
    )
    lines.append("|---" * 11 + "|")
    for one in kept:
        owner = (one["strategy"] or {}).get("owner") or one["backend"]["owner"]
        counts = (str(one["counts"][name]) for name in COUNTED)
        facts = (one["verdict"], f"0 to {one['level']}", one["contract"], *counts)
        cells = (title(one), owner, *facts, one["torch"], one["date"])
        lines.append("| " + " | ".join(cells) + " |")
    for ability in ("features", "precisions", "hooks"):
        lines += table(kept, ability)
    lines.append("\n## Strategies\n\n| backend | own strategies |\n|---|---|")
    lines += [
        f"| {title(one)} | {', '.join(one['backend']['strategies'])} |"
        for one in kept
        if not one["strategy"]
    ]
    return "\n".join(lines) + "\n"


def kept(root: Path) -> list[dict[str, Any]]:
    """What is kept of reports, in the order of their files."""
    files = sorted((root / KEPT).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def stale(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a later report says something else; counts and versions depend on the machine."""
    return any(old[key] != new[key] for key in ("verdict", "level", "contract", "strategy")) or any(
        old["backend"][key] != new["backend"][key] for key in ("strategies", "capabilities")
    )


def faults(root: Path) -> Iterator[str]:
    """Whether the page is what the reports say, and they are what the last runs said."""
    if (root / PAGE).read_text(encoding="utf-8") != page(kept(root)):
        yield f"{PAGE} is not what {KEPT} says; run ci/capabilities.py write"
    for path in sorted((root / FRESH).glob("*.json")):
        old = root / KEPT / path.name
        new = digest(json.loads(path.read_text(encoding="utf-8")))
        if not old.exists() or stale(json.loads(old.read_text(encoding="utf-8")), new):
            yield f"{path.name} says something new; run ci/capabilities.py add {FRESH}/{path.name}"


def add(root: Path, reports: list[str]) -> None:
    """Keep reports in short, under the names of their files."""
    (root / KEPT).mkdir(parents=True, exist_ok=True)
    for name in reports:
        report = json.loads(Path(name).read_text(encoding="utf-8"))
        text = json.dumps(digest(report), indent=1) + "\n"
        (root / KEPT / Path(name).name).write_text(text, encoding="utf-8")


def main() -> None:
    """Keep reports, write the page, or compare."""
    what, *reports = sys.argv[1:] or ["check"]
    if what not in {"add", "write", "check"} or bool(reports) != (what == "add"):
        raise SystemExit("capabilities.py [check | write | add REPORT.json …]")
    add(ROOT, reports)
    if what != "check":
        (ROOT / PAGE).write_text(page(kept(ROOT)), encoding="utf-8")
    lines = list(faults(ROOT))
    print("\n".join(lines) or f"{PAGE} is what {len(kept(ROOT))} reports say")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
