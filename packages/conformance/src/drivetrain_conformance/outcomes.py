"""What became of each test, put together from pytest's reports of its phases."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pytest


class Outcome(str, Enum):
    """How a test ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED_BY_DECLARATION = "skipped-by-declaration"
    """The backend does not declare it, or declares it where its refusal is tested."""
    SKIPPED_BY_MACHINE = "skipped-by-machine"
    """This machine lacks what the test needs."""
    SKIPPED = "skipped"
    """Skipped by something that is no part of the kit."""
    EXPECTED_FAILURE = "expected-failure"
    UNEXPECTED_PASS = "unexpected-pass"  # noqa: S105 - no password
    DESELECTED = "deselected"
    NOT_RUN = "not-run"


#: Outcomes after which the run has failed.
BAD = frozenset({Outcome.FAILED, Outcome.UNEXPECTED_PASS})

#: How the reasons of skipped tests begin.
BY_DECLARATION = "by declaration: "
NOT_HERE = "on this machine: "

_SKIPS = {
    BY_DECLARATION: Outcome.SKIPPED_BY_DECLARATION,
    NOT_HERE: Outcome.SKIPPED_BY_MACHINE,
}


@dataclass(slots=True)
class TestRecord:
    """One test of the suite in this run.

    Attributes:
        name: Its exact name, parameters included.
        level: Its level.
        rules: The rules that it cites.
        outcome: How it ended; not run until it did.
        reason: Why it was skipped or failed.
        seconds: Time of all its phases.
    """

    __test__ = False  # pytest would take the name for a test class

    name: str
    level: int
    rules: tuple[str, ...] = ()
    outcome: Outcome = Outcome.NOT_RUN
    reason: str = ""
    seconds: float = 0.0

    def add(self, report: pytest.TestReport) -> None:
        """Take one phase into account. A failure stays, whatever follows."""
        self.seconds += report.duration
        if self.outcome in BAD:
            return
        outcome, reason = _outcome_of(report)
        if outcome is Outcome.PASSED and (report.when != "call" or self.reason):
            return
        self.outcome, self.reason = outcome, reason


def _outcome_of(report: pytest.TestReport) -> tuple[Outcome, str]:
    if report.passed:
        return Outcome.PASSED, ""
    if report.failed:
        text = report.longreprtext.strip()
        if "[XPASS(strict)]" in text:
            return Outcome.UNEXPECTED_PASS, "It is listed as an expected failure, and it passed."
        return Outcome.FAILED, _essence(report, text)
    if hasattr(report, "wasxfail"):
        return Outcome.EXPECTED_FAILURE, str(report.wasxfail).removeprefix("reason: ")
    longrepr: Any = report.longrepr
    reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    reason = reason.removeprefix("Skipped: ")
    for start, outcome in _SKIPS.items():
        if reason.startswith(start):
            return outcome, reason.removeprefix(start)
    return Outcome.SKIPPED, reason


def _essence(report: pytest.TestReport, text: str) -> str:
    """The message of a failure, without the code around it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else text
    return str(message).strip()[:2000]


@dataclass(slots=True)
class Tally:
    """Every test of a run, by its exact name."""

    records: dict[str, TestRecord] = field(default_factory=dict)

    def counts(self, level: int | None = None) -> Mapping[str, int]:
        """How many tests were collected, and how many ended in which way."""
        found = [r for r in self.records.values() if level is None or r.level == level]
        counts = {"collected": len(found)}
        for outcome in Outcome:
            counts[outcome.value.replace("-", "_")] = sum(r.outcome is outcome for r in found)
        return counts

    def of(self, *outcomes: Outcome) -> Iterable[TestRecord]:
        """The tests that ended in one of these ways."""
        return [record for record in self.records.values() if record.outcome in outcomes]
