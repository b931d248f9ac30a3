"""Tests and rules match: what is cited exists, and what is not cited is listed with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drivetrain_conformance.selection import functions

DOCS = Path(__file__).parents[3] / "docs"

pytestmark = pytest.mark.skipif(not (DOCS / "contracts").exists(), reason="not in the repository")


def rules():
    return {
        rule
        for page in (DOCS / "contracts").glob("*.md")
        for rule in re.findall(r"^- \*\*([A-Z]\d+)\*\*", page.read_text("utf-8"), re.MULTILINE)
    }


def cited():
    return {rule for function in functions().values() for rule in function.rules}


def test_the_rules_that_tests_cite_exist():
    assert cited() - rules() == set()


def test_the_rules_that_no_test_cites_are_listed_with_a_reason():
    text = (DOCS / "conformance.md").read_text("utf-8").partition("that no test of the kit")[2]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    listed = {rule.strip() for row in rows for rule in row[1].split(",")}
    assert listed == rules() - cited()
    assert all(row[2].strip() for row in rows)
