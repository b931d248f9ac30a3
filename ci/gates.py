"""The repository's own rules. Needs no torch; prints one line for each thing that breaks one.

``gates.py`` checks the tree. ``gates.py --since REF`` also asks for a fragment in every package
whose source changed since that commit.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import golden
import untested

ROOT = Path(__file__).parents[1]
VENDORS = re.compile("cuda|xla|hpu|ipu|habana|poptorch|deepspeed|horovod", re.IGNORECASE)
NEUTRAL = ("trainer", "interfaces")
NAMES_TABLE = "packages/trainer/src/drivetrain/names.json"
OUTSIDE = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "changes", "src", "tests")
KINDS = ("removal", "feature", "deprecation", "bugfix", "doc", "trivial")
FRAGMENT = re.compile(rf"[0-9A-Za-z+-]+\.({'|'.join(KINDS)})(\.\d+)?\.md")
PAGE_PARTS = ("## What it means", "## Example", "## What to do")


def packages(root: Path) -> dict[str, dict[str, Any]]:
    """The parsed ``pyproject.toml`` of each package by folder name."""
    return {
        path.parent.name: tomllib.loads(path.read_text(encoding="utf-8"))
        for path in sorted(root.glob("packages/*/pyproject.toml"))
    }


def module_of(project: dict[str, Any]) -> str:
    """The import name of a package."""
    return str(project["project"]["name"]).replace("-", "_")


def sources(root: Path, name: str) -> list[Path]:
    """Every text file of a package's source."""
    found = (root / "packages" / name / "src").rglob("*")
    return sorted(p for p in found if p.is_file() and p.suffix in {".py", ".json", ".typed"})


def same_outside(root: Path) -> Iterator[str]:
    """Every package has the same outside, so that nobody has to learn several layouts."""
    license_text = (root / "LICENSE").read_text(encoding="utf-8")
    for name, project in packages(root).items():
        folder = root / "packages" / name
        module = module_of(project)
        for wanted in (*OUTSIDE, f"src/{module}/__init__.py", f"src/{module}/py.typed"):
            if not (folder / wanted).exists():
                yield f"packages/{name} has no {wanted}"
        own = folder / "LICENSE"
        if own.exists() and own.read_text(encoding="utf-8") != license_text:
            yield f"packages/{name}/LICENSE differs from the repository's"
        if not list((folder / "tests").glob("**/test_*.py")):
            yield f"packages/{name}/tests holds no test"
        tools = project["tool"]
        if tools.get("ruff") != {"extend": "../../pyproject.toml"}:
            yield f"packages/{name} does not take ruff's settings from the root"
        if not {"owners", "state"} <= set(tools.get("drivetrain", {})):
            yield f"packages/{name} does not say owners and state in [tool.drivetrain]"
        if project["project"].get("dynamic"):
            yield f"packages/{name} has no static version"


def neutral_source(root: Path) -> Iterator[str]:
    """The trainer and the contracts name no vendor, but for one table and the shorthand gpus."""
    for name in NEUTRAL:
        for path in sources(root, name):
            where = path.relative_to(root).as_posix()
            if where == NAMES_TABLE:
                continue
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, 1):
                if (vendor := VENDORS.search(line)) and not re.search(r"\bgpus\b", line):
                    yield f"{where}:{number} names {vendor.group()!r}"


def error_pages(root: Path) -> Iterator[str]:
    """Every error code has one owner and a page; every message is recorded in ``ci/messages``."""
    classes = golden.error_classes(root)
    for code in {code for code in classes.values() if list(classes.values()).count(code) > 1}:
        yield f"{code} belongs to {', '.join(n for n, c in classes.items() if c == code)}"
    owners = {code: name for name, code in classes.items() if name != golden.BASE}
    pages = {path.stem: path for path in (root / "docs/errors").glob("DT*.md")}
    yield from (f"docs/errors has nothing on {code}" for code in sorted(set(owners) - set(pages)))
    yield from (f"docs/errors has {code}, which no error uses" for code in set(pages) - set(owners))
    for code, path in sorted(pages.items()):
        text = path.read_text(encoding="utf-8")
        wanted = (*PAGE_PARTS, f"[{code}]", owners.get(code, ""))
        yield from (f"docs/errors/{code}.md has no {part!r}" for part in wanted if part not in text)
    yield from golden.faults(root)


def contracts_agree(root: Path) -> Iterator[str]:
    """The contract that a package states to the installer is the one it states at run time."""
    found = packages(root)
    version = found["interfaces"]["project"]["version"]
    served = _contracts(root / "packages/interfaces/src/drivetrain_interfaces/contract.py")
    if [version.split(".")[:2]] != [c.split(".") for c in served]:
        yield f"drivetrain-interfaces is {version}, but CONTRACT is {', '.join(served)}"
    for name, project in found.items():
        needs = [n for n in project["project"]["dependencies"] if "drivetrain-interfaces" in n]
        stated = [
            c
            for path in sources(root, name)
            if path.name == "__init__.py"
            for c in _contracts(path)
        ]
        points = project["project"].get("entry-points", {})
        if not stated and {"drivetrain.backends", "drivetrain.strategies"} & set(points):
            yield f"packages/{name} registers a spec, but states no ContractVersion in __init__.py"
        for contract in stated:
            lower = re.search(r">=(\d+\.\d+)", needs[0]) if needs else None
            if lower is None or lower.group(1) != contract:
                yield f"packages/{name} was written for contract {contract}, but declares {needs}"


def _contracts(path: Path) -> list[str]:
    calls = [
        n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)
    ]
    return [
        ".".join(str(a.value) for a in call.args if isinstance(a, ast.Constant))
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "ContractVersion"
    ]


def modules_stay_short(root: Path) -> Iterator[str]:
    """No module is longer than the budget of its package."""
    budgets = tomllib.loads((root / "ci/budgets.toml").read_text(encoding="utf-8"))["lines"]
    for name in packages(root):
        most = budgets.get(name, budgets["default"])
        for path in sources(root, name):
            if path.suffix == ".py":
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines > most:
                    yield f"{path.relative_to(root)} has {lines} lines, {lines - most} too many"


def everybody_is_listed(root: Path) -> Iterator[str]:
    """A new package is in the import rules and in the table of the README."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    linted = settings["tool"]["importlinter"]["root_packages"]
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name, project in packages(root).items():
        if module_of(project) not in linted:
            yield f"packages/{name} is not in root_packages of [tool.importlinter]"
        if f"(packages/{name}/README.md)" not in readme:
            yield f"README.md does not link packages/{name}/README.md"


def fragments(root: Path) -> Iterator[str]:
    """Fragments are named so that the release session can read their kind, and say something."""
    for path in sorted(root.glob("packages/*/changes/*")):
        where = path.relative_to(root).as_posix()
        if path.name.startswith("."):
            continue
        if not FRAGMENT.fullmatch(path.name):
            yield f"{where} is not named <id>.<kind>.md with a kind of {', '.join(KINDS)}"
        elif not path.read_text(encoding="utf-8").strip():
            yield f"{where} is empty"


def changes_are_told(root: Path, since: str) -> Iterator[str]:
    """A change of a package's source comes with a fragment (``trivial`` if nobody need know)."""
    command = ("git", "diff", "--name-only", "--diff-filter=ACMRD", f"{since}...HEAD")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    changed = done.stdout.splitlines()
    for name in packages(root):
        base = f"packages/{name}"
        source = [path for path in changed if path.startswith(f"{base}/src/")]
        told = [
            path for path in changed if path.startswith((f"{base}/changes/", f"{base}/CHANGELOG"))
        ]
        if source and not told:
            yield f"{base}/src changed since {since}, and {base}/changes tells nobody"


def untested_rules(root: Path) -> Iterator[str]:
    """Every rule of the contracts is broken by a mutant, or listed as one that none breaks."""
    yield from untested.faults(root)


GATES: tuple[Callable[[Path], Iterator[str]], ...] = (
    same_outside,
    neutral_source,
    error_pages,
    contracts_agree,
    modules_stay_short,
    everybody_is_listed,
    fragments,
)


def main() -> None:
    """Run every gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", help="ask for fragments of what changed since this commit")
    since = parser.parse_args().since
    broken = 0
    for gate in GATES:
        faults = list(gate(ROOT))
        broken += len(faults)
        print(f"{'FAIL' if faults else 'ok  '} {gate.__name__}: {gate.__doc__}")
        print("".join(f"       {fault}\n" for fault in faults), end="")
    for fault in changes_are_told(ROOT, since) if since else ():
        broken += 1
        print(f"FAIL {fault}")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
