"""The conformance kit: a pytest plugin and a suite that prove a backend against the contracts.

Run it with ``pytest --pyargs drivetrain_conformance.suite --drivetrain-backend=NAME``. What it
tests are the numbered rules of ``docs/contracts``; how to read and use it is in
``docs/conformance.md``.
"""

from __future__ import annotations

from importlib import metadata

__all__ = ["DISTRIBUTION", "version"]

DISTRIBUTION = "drivetrain-conformance"


def version() -> str:
    """The version of the kit, or ``"unknown"`` where it is not installed but on the path."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
