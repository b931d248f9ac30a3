"""Import every module of an installed distribution and load what it registers.

Run in an environment that holds the distribution and what it declares, and nothing else: what is
missing there is missing from its metadata.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib import metadata
from pathlib import Path


def main() -> None:
    """Check the distribution named on the command line."""
    name = sys.argv[1]
    distribution = metadata.distribution(name)
    module = importlib.import_module(name.replace("-", "_"))
    home = Path(module.__file__ or "").resolve()
    if not home.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"{name} was imported from {home}, not from its wheel")
    modules = [
        found.name
        for found in pkgutil.walk_packages(module.__path__, f"{module.__name__}.")
        if not found.name.endswith("__main__")
    ]
    for found in modules:
        importlib.import_module(found)
    points = list(distribution.entry_points)
    for point in points:
        point.load()
    print(f"{name} {distribution.version}: {len(modules) + 1} modules, {len(points)} entry points")


if __name__ == "__main__":
    main()
