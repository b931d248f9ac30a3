"""One run of the suite: what pytest's hooks have to know and to do about it."""

from __future__ import annotations

import datetime as dt
import fnmatch
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces.errors import listed

from drivetrain_conformance import version
from drivetrain_conformance.expectations import Expectation, unknown_entries
from drivetrain_conformance.outcomes import BAD, BY_DECLARATION, Outcome, Tally, TestRecord
from drivetrain_conformance.report import Verdict, build_report, write_report
from drivetrain_conformance.selection import functions, is_test_file, level_of, rules_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from drivetrain_conformance.options import Options
    from drivetrain_conformance.target import Target

#: Seconds that one test may take where pytest-timeout is installed; a vendor's own limit is meant
#: for their own tests.
TEST_TIMEOUT = 600

RUN = pytest.StashKey["ConformanceRun"]()


class ConformanceRun:
    """The pytest plugin of one run, registered only when a backend is named.

    Args:
        config: pytest's.
        options: What the command line asks for.
        target: What is under test.
        expectations: The expected failures.
    """

    def __init__(
        self,
        config: pytest.Config,
        options: Options,
        target: Target,
        expectations: tuple[Expectation, ...],
    ) -> None:
        self.config = config
        self.options = options
        self.target = target
        self.expectations = expectations
        self.tally = Tally()
        self.problems: list[str] = []
        self.deviations: list[str] = []
        self.started = dt.datetime.now(dt.timezone.utc)
        self.verdict = Verdict.NOT_A_CONFORMANCE_RUN

    def pytest_report_header(self) -> list[str]:
        """What is under test."""
        spec = self.target.spec
        strategy = f", strategy {self.target.strategy_name}" if self.target.strategy_name else ""
        line = (
            f"drivetrain conformance kit {version()}: backend {spec.name} of "
            f"{self.target.backend.owner}, contract {spec.contract}{strategy}, "
            f"levels up to {self.options.level}"
        )
        return [line]

    # Collection: whatever a vendor's settings say about names and folders, the suite is the suite.

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out the levels that were not asked for; their modules may need torch."""
        level = level_of(collection_path)
        return True if level is not None and level > self.options.level else None

    def pytest_collect_file(
        self, file_path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        """Collect the suite's modules also where ``python_files`` would not."""
        if not is_test_file(file_path) or parent.session.isinitpath(file_path):
            return None
        patterns = self.config.getini("python_files")
        if any(fnmatch.fnmatch(file_path.name, pattern) for pattern in patterns):
            return None
        return pytest.Module.from_parent(parent, path=file_path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Collector, name: str, obj: Any
    ) -> list[pytest.Item] | None:
        """Collect the suite's functions, and nothing else, whatever ``python_functions`` is."""
        if not is_test_file(collector.path):
            return None
        if name not in functions():
            return []
        obj.__test__ = True
        return None

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Give a test of the suite what it needs, instead of what the vendor's settings say."""
        if not is_test_file(item.path):
            return
        if item.name in self.tally.records:
            raise pytest.UsageError(f"The suite holds two tests called {item.name}.")
        level = level_of(item.path)
        assert level is not None
        rules = rules_of(getattr(getattr(item, "obj", None), "__doc__", None) or "")
        self.tally.records[item.name] = TestRecord(item.name, level, rules)
        item.add_marker(pytest.mark.filterwarnings("default"))
        if self.config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        """Mark expected failures, before anything is deselected."""
        today = dt.datetime.now(dt.timezone.utc).date()
        by_name = {item.name: item for item in items if is_test_file(item.path)}
        unknown = unknown_entries(self.expectations, by_name, functions())
        for entry in self.expectations:
            if entry in unknown:
                self.problems.append(f"The expected failure {entry.test!r} names no test.")
            elif entry.expired(today):
                self.problems.append(
                    f"The expected failure {entry.test!r} ended on {entry.until} ({entry.issue})."
                )
            elif entry.test in by_name:
                reason = f"{entry.reason} ({entry.issue}, until {entry.until})"
                by_name[entry.test].add_marker(pytest.mark.xfail(reason=reason, strict=True))

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note tests that somebody left out."""
        for item in items:
            if is_test_file(item.path):
                self.tally.records[item.name].outcome = Outcome.DESELECTED

    # Running

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip what the backend does not declare, and refusals of what it does."""
        if not is_test_file(item.path):
            return
        for marker in item.iter_markers("needs"):
            missing = [a for a in marker.args if not self.target.declares(a)]
            if missing:
                names = listed(getattr(a, "value", a) for a in missing)
                pytest.skip(f"{BY_DECLARATION}{names} is not declared")
        for marker in item.iter_markers("refuses"):
            declared = [a for a in marker.args if self.target.declares(a)]
            if declared:
                names = listed(getattr(a, "value", a) for a in declared)
                pytest.skip(f"{BY_DECLARATION}{names} is declared, and so not refused")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended."""
        name = report.nodeid.partition("::")[2]
        if name in self.tally.records:
            self.tally.records[name].add(report)

    # The end

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge the run, fail it for stale expectations, and write the report."""
        self._note_stale_expectations()
        self._note_deviations()
        failed = bool(self.problems) or any(self.tally.of(*BAD))
        if failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.deviations:
            self.verdict = Verdict.NOT_A_CONFORMANCE_RUN
        else:
            self.verdict = Verdict.FAILED if failed else Verdict.PASSED
        if self.options.report is not None:
            write_report(self.options.report, build_report(self))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what the run is worth."""
        say = terminalreporter
        say.section("drivetrain conformance")
        counts = ((k.replace("_", " "), n) for k, n in self.tally.counts().items())
        say.line(", ".join(f"{n} {what}" for what, n in counts if n or what == "collected"))
        for problem in self.problems:
            say.line(problem, red=True)
        if self.deviations:
            say.line("This was not a conformance run:", yellow=True, bold=True)
            for deviation in self.deviations:
                say.line(f"  {deviation}", yellow=True)
        else:
            good = self.verdict is Verdict.PASSED
            levels = f"levels 0 to {self.options.level}" if self.options.level else "level 0"
            say.line(
                f"{self.target.spec.name}: {self.verdict.value} at {levels} of contract "
                f"{self.target.spec.contract}",
                green=good,
                red=not good,
            )
        if self.options.report is not None:
            say.line(f"report: {self.options.report}")

    def _note_stale_expectations(self) -> None:
        for entry in self.expectations:
            record = self.tally.records.get(entry.test)
            if record is not None and record.outcome is Outcome.SKIPPED_BY_DECLARATION:
                self.problems.append(
                    f"The expected failure {entry.test!r} is of a test that does not apply: "
                    f"{record.reason}."
                )

    def _note_deviations(self) -> None:
        note = self.deviations.append
        if self.config.option.collectonly:
            note("The tests were only collected.")
        collected = {name.partition("[")[0] for name in self.tally.records}
        wanted = {f.name for f in functions().values() if f.level <= self.options.level}
        if missing := sorted(wanted - collected):
            note(f"{len(missing)} tests were not collected, such as {missing[0]}.")
        if any("::" in str(argument) for argument in self.config.args):
            note("Single tests were named on the command line.")
        for outcome, what in (
            (Outcome.DESELECTED, "deselected"),
            (Outcome.NOT_RUN, "not run"),
            (Outcome.SKIPPED, "skipped by something else than the kit"),
        ):
            if found := list(self.tally.of(outcome)):
                note(f"{len(found)} tests were {what}, such as {found[0].name}.")
