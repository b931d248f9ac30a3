"""The pytest plugin. Without ``--drivetrain-backend`` it adds options and markers, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_conformance.options import add_options, read_options

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

MARKERS = (
    "needs(*abilities): a test of the drivetrain conformance suite that runs if all are declared",
    "refuses(*abilities): a test that runs if none is declared: each must be refused",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the kit's options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Find what is under test, and register the run. Raises ``UsageError`` if there is nothing."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    options = read_options(config)
    if options is None:
        return
    # Most runs of pytest where the kit is installed are none of the kit's.
    from drivetrain_conformance import fixtures
    from drivetrain_conformance.expectations import ExpectationsError, read_expectations
    from drivetrain_conformance.run import RUN, ConformanceRun
    from drivetrain_conformance.target import TargetError, add_to_path, find_target

    add_to_path(str(config.invocation_params.dir))
    try:
        target = find_target(options.backend, options.strategy)
        expectations = read_expectations(options.xfails) if options.xfails else ()
    except (TargetError, ExpectationsError) as error:
        raise pytest.UsageError(str(error)) from error
    run = ConformanceRun(config, options, target, expectations)
    config.stash[RUN] = run
    config.pluginmanager.register(run, "drivetrain-conformance-run")
    config.pluginmanager.register(fixtures, "drivetrain-conformance-fixtures")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Run the suite in this process, not in pytest-xdist's: its tests share one device."""
    named = config.getoption("--drivetrain-backend") is not None
    if named and getattr(config.option, "numprocesses", None):
        config.option.numprocesses = None
    return (yield)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> None:
    """Say what is missing when the suite is run without a backend."""
    if parent.config.getoption("--drivetrain-backend") is not None:
        return
    if file_path.name.startswith("test_") and file_path.parent.parent.name == "suite":
        from drivetrain_conformance.selection import is_test_file

        if is_test_file(file_path):
            raise pytest.UsageError(
                "The drivetrain conformance suite was started without a backend to test. "
                "Add --drivetrain-backend=NAME."
            )
