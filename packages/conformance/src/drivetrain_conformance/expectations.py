"""Failures that a backend expects: each with a reason, an issue, and a day on which it ends."""

from __future__ import annotations

import datetime as dt
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

_KEYS = ("test", "reason", "issue", "until")


class ExpectationsError(Exception):
    """The file of expected failures is missing or is not what it should be."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """One test that is expected to fail.

    Attributes:
        test: The exact name of the test, with its parameters in brackets if it has any.
        reason: Why it fails.
        issue: Where that is tracked.
        until: The last day on which the failure is accepted.
    """

    test: str
    reason: str
    issue: str
    until: dt.date

    def expired(self, today: dt.date) -> bool:
        """Whether the last day is over."""
        return today > self.until

    @property
    def function(self) -> str:
        """The name of the test without its parameters."""
        return self.test.partition("[")[0]


def read_expectations(path: Path) -> tuple[Expectation, ...]:
    """The entries of a TOML file with a list of tables ``[[xfail]]``.

    Raises:
        ExpectationsError: It cannot be read, an entry lacks a key or has another, a value is of
            the wrong kind, or a test is listed twice.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpectationsError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ExpectationsError(f"{path} is not TOML: {error}.") from error
    unknown = sorted(set(content) - {"xfail"})
    entries = content.get("xfail", [])
    if unknown or not isinstance(entries, list):
        raise ExpectationsError(f"{path} holds {unknown}; it may hold [[xfail]] tables only.")
    found = tuple(_entry(item, f"{path}, entry {n}") for n, item in enumerate(entries, 1))
    tests = [entry.test for entry in found]
    for test in tests:
        if tests.count(test) > 1:
            raise ExpectationsError(f"{path} lists {test!r} twice.")
    return found


def _entry(item: Any, where: str) -> Expectation:
    if not isinstance(item, dict) or set(item) != set(_KEYS):
        keys = sorted(item) if isinstance(item, dict) else item
        raise ExpectationsError(f"{where} has {keys}; it must have exactly {list(_KEYS)}.")
    for key in ("test", "reason", "issue"):
        if not isinstance(item[key], str) or not item[key].strip():
            raise ExpectationsError(f"{where} has {key} = {item[key]!r}, not a text.")
    return Expectation(item["test"], item["reason"], item["issue"], _date(item["until"], where))


def _date(value: Any, where: str) -> dt.date:
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value
    try:
        return dt.date.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise ExpectationsError(
            f"{where} has until = {value!r}, not a day such as 2027-06-30."
        ) from error


def unknown_entries(
    entries: Iterable[Expectation], collected: Collection[str], known_functions: Collection[str]
) -> list[Expectation]:
    """Entries that name no test.

    Args:
        entries: The expected failures.
        collected: Exact names of the tests that were collected.
        known_functions: Names of all test functions of the suite, of every level. The parameters
            of one that was not collected cannot be checked.
    """
    functions = {name.partition("[")[0] for name in collected}
    return [
        entry
        for entry in entries
        if entry.test not in collected
        and (entry.function in functions or entry.function not in known_functions)
    ]
