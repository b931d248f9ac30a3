"""What the kit is asked for on pytest's command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

#: 0 runs anywhere, 1 needs a device, 2 starts processes, 3 compares loss curves.
LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one run of the kit.

    Attributes:
        backend: A registered name, or ``module:object``.
        strategy: One of the backend's strategies, a registered strategy, or ``module:object``.
            None tests the backend's own.
        level: The highest level that runs; those below it run too.
        xfails: A TOML file with the expected failures, if any.
        report: Where the JSON report goes, if anywhere.
    """

    backend: str
    strategy: str | None = None
    level: int = LEVELS[-1]
    xfails: Path | None = None
    report: Path | None = None


def add_options(parser: pytest.Parser) -> None:
    """Tell pytest about the options."""
    group = parser.getgroup("drivetrain", "drivetrain conformance kit")
    group.addoption(
        "--drivetrain-backend",
        metavar="NAME",
        help="the backend to test: its registered name, or module:object for one not installed",
    )
    group.addoption(
        "--drivetrain-strategy",
        metavar="NAME",
        help="the strategy to test on it; by default the backend's own",
    )
    group.addoption(
        "--drivetrain-level",
        type=int,
        choices=LEVELS,
        default=LEVELS[-1],
        metavar="0..3",
        help="the highest level to run: 0 anywhere, 1 one device, 2 processes, 3 loss curves",
    )
    group.addoption(
        "--drivetrain-xfails", metavar="FILE.toml", help="the failures that are expected, and why"
    )
    group.addoption(
        "--drivetrain-report", metavar="FILE.json", help="where to write the report of the run"
    )


def read_options(config: pytest.Config) -> Options | None:
    """The options of this run; None if no backend is named, so that the kit stays out of it."""
    backend = config.getoption("--drivetrain-backend")
    if backend is None:
        return None
    here = config.invocation_params.dir
    xfails = config.getoption("--drivetrain-xfails")
    report = config.getoption("--drivetrain-report")
    return Options(
        backend=backend,
        strategy=config.getoption("--drivetrain-strategy"),
        level=config.getoption("--drivetrain-level"),
        xfails=here / Path(xfails) if xfails else None,
        report=here / Path(report) if report else None,
    )
