"""Which rules of the contracts a mutant breaks, and which none does.

``docs/untested-rules.md`` is made from the rules in ``docs/contracts``, the suite of the kit, and
its table of mutants. ``untested.py --write`` makes it, ``untested.py`` compares.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PAGE = "docs/untested-rules.md"
MUTANTS = "packages/conformance/tests/mutants.toml"
SUITE = "packages/conformance/src/drivetrain_conformance/suite"
RULE = re.compile(r"^- \*\*([A-Z]\d+)\*\* (.*?)(?=^- |^$|^#|\Z)", re.MULTILINE | re.DOTALL)
HEAD = """# Rules that no mutant breaks

This page is made by `python ci/untested.py --write`; do not edit it.

A rule of [the contracts](index.md#bringing-hardware) is tested if the conformance kit notices a
backend that breaks it. So the kit's own tests hold {mutants} mutants, backends that each break a
rule, and for each the exact tests that must notice. They break {broken} of {rules} rules. The
others are listed here. A rule with tests and without a mutant is one whose tests nobody has seen
fail. Rules that bind no backend, such as those of the shared launchers and cluster environments,
are tested where these parts are made.
"""


@dataclass
class Rule:
    """One numbered rule.

    Attributes:
        text: Its first sentence.
        contract: The page that it is on.
        tests: Functions of the suite that cite it.
        mutants: Those that break it.
    """

    text: str
    contract: str
    tests: list[str] = field(default_factory=list)
    mutants: list[str] = field(default_factory=list)


def rules(root: Path) -> dict[str, Rule]:
    """Every rule of the contracts by its number, in order."""
    found = {}
    for page in sorted((root / "docs/contracts").glob("*.md")):
        for number, text in RULE.findall(page.read_text(encoding="utf-8")):
            sentence = re.split(r"(?<=[.:]) ", " ".join(text.split()), maxsplit=1)[0]
            found[number] = Rule(sentence.rstrip(".:"), page.stem)
    return found


def cited(root: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a rule and a function of the suite that cites it."""
    for path in sorted((root / SUITE).glob("level*/test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for line in (ast.get_docstring(node) or "").splitlines():
                    if line.strip().startswith("R:"):
                        for number in line.strip()[2:].split(","):
                            yield number.strip(" ."), node.name


def survey(root: Path) -> tuple[dict[str, Rule], list[str], int]:
    """The rules with what tests and breaks them, what is wrong, and how many mutants there are."""
    found, wrong = rules(root), []
    by_test: dict[str, set[str]] = {}
    for number, test in cited(root):
        by_test.setdefault(test, set()).add(number)
        if number in found:
            found[number].tests.append(test)
        else:
            wrong.append(f"{test} cites {number}, which is no rule")
    mutants = tomllib.loads((root / MUTANTS).read_text(encoding="utf-8"))["mutant"]
    for mutant in mutants:
        name, tests = mutant["name"], mutant["caught_by"]
        unknown = sorted(set(tests) - set(by_test))
        wrong += [f"{name} is caught by {test}, which is no test of the suite" for test in unknown]
        if not tests:
            wrong.append(f"{name} is caught by nothing")
        for number in mutant["rules"]:
            if number not in found:
                wrong.append(f"{name} breaks {number}, which is no rule")
            elif not any(number in by_test.get(test, ()) for test in tests):
                wrong.append(f"{name} breaks {number}, and no test that catches it cites that")
            else:
                found[number].mutants.append(name)
    return found, wrong, len(mutants)


def page(found: dict[str, Rule], mutants: int) -> str:
    """The text of the page."""
    broken = sum(bool(rule.mutants) for rule in found.values())
    lines = [HEAD.format(mutants=mutants, broken=broken, rules=len(found))]
    for contract in dict.fromkeys(rule.contract for rule in found.values()):
        mine = {n: r for n, r in found.items() if r.contract == contract}
        untested = {n: r for n, r in mine.items() if not r.mutants}
        lines.append(f"\n## {contract}\n")
        lines.append(f"{len(mine) - len(untested)} of {len(mine)} rules are broken by a mutant.")
        if untested:
            lines.append("\n| rule | says | tests of the suite |\n|---|---|---|")
            lines += [
                f"| {number} | {rule.text} | {len(rule.tests) or 'none'} |"
                for number, rule in untested.items()
            ]
    return "\n".join(lines) + "\n"


def faults(root: Path) -> Iterator[str]:
    """What is wrong in the table of mutants, and whether the page is what it should be."""
    if not (root / MUTANTS).exists():
        return
    found, wrong, mutants = survey(root)
    yield from wrong
    path = root / PAGE
    if not path.exists() or path.read_text(encoding="utf-8") != page(found, mutants):
        yield f"{PAGE} is not what the rules and mutants say; run ci/untested.py --write"


def main() -> None:
    """Compare, or write."""
    if sys.argv[1:] == ["--write"]:
        found, _, mutants = survey(ROOT)
        (ROOT / PAGE).write_text(page(found, mutants), encoding="utf-8")
    lines = list(faults(ROOT))
    print("\n".join(lines) or "every rule is listed as it is tested")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
