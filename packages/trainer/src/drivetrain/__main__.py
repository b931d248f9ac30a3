"""``python -m drivetrain`` is the ``drivetrain`` command."""

import sys

from drivetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
