"""Processes killed with -9 at many points: nothing is lost, and the run goes on as if undisturbed.

``nox -s kills`` does the same with 200 deaths and more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Starter


def test_twenty_processes_are_killed_and_nothing_is_lost(start: Starter) -> None:
    running = start.run("kills.py", "--kills", "20")
    summary = running.lines[-1]
    assert summary.startswith("20 kills ("), running.output
    assert "none half visible, none missing" in summary


def test_ranks_are_killed_and_nothing_is_lost(start: Starter) -> None:
    """A rank or the launcher of two; and a state so large that it goes past the page cache."""
    variants = ("--variant", "two ranks", "--variant", "large")
    running = start.run("kills.py", "--kills", "4", *variants)
    summary = running.lines[-1]
    assert summary.startswith("4 kills ("), running.output
    assert "none half visible, none missing" in summary
