"""The order of what happened, for tests of marks."""

from __future__ import annotations

CALLS: list[str] = []
