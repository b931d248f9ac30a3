"""The text of every error in the source, by code, so that a changed message is a visible change.

``ci/messages/<CODE>.txt`` holds two parts: messages as readers see them, which tests produce, and
below them every message as it is written in the source, which ``golden.py --write`` updates.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
WRITTEN = "# as written"
#: The base class, which is never raised itself.
BASE = "DrivetrainError"


def parsed(root: Path) -> dict[str, ast.Module]:
    """Every module of every package by its path."""
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(root.glob("packages/*/src/**/*.py"))
    }


def error_classes(root: Path) -> dict[str, str]:
    """The code of each error class by its name."""
    return {
        node.name: item.value.value
        for tree in parsed(root).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
        for item in node.body
        if isinstance(item, (ast.Assign, ast.AnnAssign))
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
        and _target(item) == "code"
    }


def _target(item: ast.Assign | ast.AnnAssign) -> str:
    target = item.target if isinstance(item, ast.AnnAssign) else item.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def template(node: ast.expr) -> str:
    """A message as it is written, with what is filled in between braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        shown = "!r" if node.conversion == ord("r") else ""
        return f"{{{ast.unparse(node.value)}{shown}}}"
    if isinstance(node, ast.IfExp):
        return f"{{{template(node.body)} | {template(node.orelse)}}}"
    return f"{{{ast.unparse(node)}}}"


def _calls(tree: ast.Module, codes: dict[str, str]) -> Iterator[tuple[str, ast.Call]]:
    """Calls that make an error, with its code; ``cls(…)`` counts inside an error class."""
    for scope in ast.walk(tree):
        if isinstance(scope, ast.ClassDef) and scope.name in codes:
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "cls":
                    yield codes[scope.name], node
        elif isinstance(scope, ast.Call) and ast.unparse(scope.func).split(".")[-1] in codes:
            yield codes[ast.unparse(scope.func).split(".")[-1]], scope


def written(root: Path) -> dict[str, list[str]]:
    """Every message in the source by code, each with the file it is in."""
    codes = error_classes(root)
    found: dict[str, list[str]] = {code: [] for name, code in codes.items() if name != BASE}
    for where, tree in parsed(root).items():
        for code, call in _calls(tree, codes):
            parts = [template(part) for part in call.args if not isinstance(part, ast.Starred)]
            if code in found and parts:
                folder = where.split("/")[1]
                found[code].append(f"{folder}: {' '.join(parts)}")
    return {code: sorted(set(lines)) for code, lines in found.items()}


def rendered(current: str) -> list[str]:
    """The messages of a golden file as readers see them."""
    text = current.partition(WRITTEN)[0].partition("\n")[2].strip("\n")
    return text.split("\n\n") if text else []


def expected(code: str, lines: list[str], current: str) -> str:
    """What the golden file of a code has to hold, given what it holds now."""
    kept = current.partition(WRITTEN)[0].rstrip("\n")
    head = f"{kept}\n\n" if kept else ""
    body = "\n\n".join(lines) or f"Nothing raises {code}."
    return f"{head}{WRITTEN}\n{body}\n"


def faults(root: Path) -> Iterator[str]:
    """What differs between the source and the golden files."""
    found = written(root)
    folder = root / "ci/messages"
    for code, lines in sorted(found.items()):
        path = folder / f"{code}.txt"
        current = path.read_text(encoding="utf-8") if path.exists() else ""
        if current != expected(code, lines, current):
            yield f"{path.relative_to(root)} is not what the source says; run ci/golden.py --write"
        for message in rendered(current):
            if not message.endswith(f"[{code}]"):
                yield f"{path.relative_to(root)} holds a message without its code: {message!r}"
    for path in sorted(folder.glob("*.txt")):
        if path.stem not in found:
            yield f"{path.relative_to(root)} belongs to no error"


def main() -> None:
    """Compare, or write."""
    if sys.argv[1:] == ["--write"]:
        for code, lines in written(ROOT).items():
            path = ROOT / f"ci/messages/{code}.txt"
            current = path.read_text(encoding="utf-8") if path.exists() else ""
            path.write_text(expected(code, lines, current), encoding="utf-8")
    lines = list(faults(ROOT))
    print("\n".join(lines) or "every message is as recorded")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
