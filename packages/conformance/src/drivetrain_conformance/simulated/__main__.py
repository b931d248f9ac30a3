"""``python -m drivetrain_conformance.simulated`` compiles the simulated device ahead of its use."""

from __future__ import annotations

import sys

from drivetrain_interfaces import UnavailableError

from drivetrain_conformance.simulated.building import build


def main() -> int:
    """Compile it unless that was done, and say where it is."""
    try:
        sys.stdout.write(f"{build()}\n")
    except UnavailableError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
