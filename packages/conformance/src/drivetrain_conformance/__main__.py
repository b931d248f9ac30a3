"""``python -m drivetrain_conformance new acme``: the same as ``drivetrain new-backend acme``."""

from __future__ import annotations

import sys

_USAGE = "usage: python -m drivetrain_conformance new NAME [options]"


def main(words: list[str]) -> int:
    """Run one command; returns the exit code."""
    if words[:1] != ["new"]:
        sys.stderr.write(f"{_USAGE}\n")
        return 2
    from drivetrain_conformance.scaffold import main as new

    return new(words[1:], "python -m drivetrain_conformance new")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
