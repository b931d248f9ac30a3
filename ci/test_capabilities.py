"""The page of capabilities follows the reports, and is found out when it does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import capabilities
import pytest

if TYPE_CHECKING:
    from pathlib import Path


def report(**changes: Any) -> dict[str, Any]:
    abilities = {"features": ["closure"], "precisions": ["32-true"], "hooks": []}
    return {
        "kit": {"contract": "0.1"},
        "backend": {
            "name": "npu",
            "owner": "drivetrain-npu 1.2",
            "strategies": ["single_device"],
            "capabilities": abilities,
        },
        "strategy": None,
        "verdict": "passed",
        "level": 1,
        "counts": dict.fromkeys(capabilities.COUNTED, 3),
        "environment": {"packages": {"torch": "2.13.0+cpu"}},
        "started": "2026-01-02T03:04:05+00:00",
        **changes,
    }


def wrote(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    capabilities.add(tmp_path, [wrote(tmp_path / "build/reports/npu.json", report())])
    text = capabilities.page(capabilities.kept(tmp_path))
    (tmp_path / capabilities.PAGE).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_page_says_what_was_declared_and_tested(root: Path) -> None:
    text = (root / capabilities.PAGE).read_text(encoding="utf-8")
    assert "| npu | drivetrain-npu 1.2 | passed | 0 to 1 | 0.1 | 3 |" in text
    assert "| closure | yes |" in text
    assert not list(capabilities.faults(root))


def test_a_strategy_has_a_column_of_its_own(root: Path) -> None:
    own = {
        "name": "zero",
        "owner": "z 1",
        "capabilities": {"features": [], "precisions": [], "hooks": []},
    }
    path = wrote(root / "other.json", report(strategy=own))
    capabilities.add(root, [path])
    text = capabilities.page(capabilities.kept(root))
    assert "| npu | npu + zero |" in text
    assert "| closure | yes | no |" in text


def test_a_strategy_of_the_backend_has_its_owner(root: Path) -> None:
    own = {"name": "one", "capabilities": {"features": [], "precisions": [], "hooks": []}}
    capabilities.add(root, [wrote(root / "other.json", report(strategy=own))])
    text = capabilities.page(capabilities.kept(root))
    assert "| npu + one | drivetrain-npu 1.2 |" in text
    assert "| closure | yes | no |" in text


@pytest.mark.parametrize(
    "change", [{"verdict": "failed"}, {"level": 0}, {"strategy": {"name": "x"}}]
)
def test_a_later_run_that_says_something_else_is_a_fault(
    root: Path, change: dict[str, Any]
) -> None:
    wrote(root / "build/reports/npu.json", report(**change))
    assert list(capabilities.faults(root)) == [
        "npu.json says something new; run ci/capabilities.py add build/reports/npu.json"
    ]


def test_counts_and_versions_may_differ(root: Path) -> None:
    counts = dict.fromkeys(capabilities.COUNTED, 4)
    wrote(root / "build/reports/npu.json", report(counts=counts, started="2027-01-01T00:00:00"))
    assert not list(capabilities.faults(root))


def test_a_page_that_was_edited_is_a_fault(root: Path) -> None:
    with (root / capabilities.PAGE).open("a", encoding="utf-8") as page:
        page.write("and more\n")
    assert [fault.split()[0] for fault in capabilities.faults(root)] == [capabilities.PAGE]
