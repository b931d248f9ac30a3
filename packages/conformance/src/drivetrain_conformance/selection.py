"""Which tests the suite holds at each level, known without importing any of them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SUITE = Path(__file__).resolve().parent / "suite"


@dataclass(frozen=True, slots=True)
class Function:
    """One test function of the suite.

    Attributes:
        name: Its name, which no other function of the suite has.
        level: The level it belongs to.
        path: Its file.
        rules: Numbers of the rules that it cites.
    """

    name: str
    level: int
    path: Path
    rules: tuple[str, ...]


@cache
def level_of(path: Path) -> int | None:
    """The level that a file or folder of the suite belongs to; None for any other path."""
    try:
        parts = path.resolve().relative_to(SUITE).parts
    except ValueError:
        return None
    if parts and parts[0].startswith("level"):
        return int(parts[0].removeprefix("level"))
    return None


def is_test_file(path: Path) -> bool:
    """Whether this is a test module of the suite."""
    return path.suffix == ".py" and path.name.startswith("test_") and level_of(path) is not None


@cache
def functions() -> dict[str, Function]:
    """Every test function of the suite by name."""
    found: dict[str, Function] = {}
    for path in sorted(SUITE.glob("level*/test_*.py")):
        level = level_of(path)
        assert level is not None
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert node.name not in found, f"two tests are called {node.name}"
                rules = rules_of(ast.get_docstring(node) or "")
                found[node.name] = Function(node.name, level, path, rules)
    return found


def rules_of(docstring: str) -> tuple[str, ...]:
    """The numbers in the docstring's line that starts with ``R:``."""
    for line in docstring.splitlines():
        if line.strip().startswith("R:"):
            return tuple(part.strip(" .") for part in line.strip()[2:].split(","))
    return ()
