"""The page of faults names tests that there are, and all that only cause faults."""

from __future__ import annotations

import re
from pathlib import Path

import kills

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/checkpoint-faults.md").read_text(encoding="utf-8")
#: Whose every test causes a fault.
WHOLE = ("test_checkpoint_faults.py", "test_checkpoint_hostile.py", "test_jsontext.py",
         "test_kills.py")  # fmt: skip


def names_in(name: str) -> set[str]:
    (path,) = [*ROOT.glob(f"packages/*/tests/{name}"), *ROOT.glob(f"tests-integration/{name}")]
    return set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert named
    assert [f"{file}::{test}" for file, test in named if test not in names_in(file)] == []


def test_every_test_of_faults_is_on_the_page() -> None:
    missing = {test for file in WHOLE for test in names_in(file) if f"{file}::{test}" not in PAGE}
    assert missing == set()


def test_every_point_of_the_kills_is_on_the_page() -> None:
    assert [point for point in kills.LARGE_POINTS if f"`{point}`" not in PAGE] == []
