"""Import every module of an installed distribution and load what it registers.

Run in an environment that holds the distribution and what it declares, and nothing else: what is
missing there is missing from its metadata. What others bring (``brought`` in
``[tool.drivetrain]``, such as the torch of a backend under test) is named after the distribution,
and modules may wait for it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib import metadata
from pathlib import Path


def _imports(module: str, brought: list[str]) -> bool:
    """Import a module; False if it waits for something that others bring."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in brought:
            raise
        return False
    return True


def main() -> None:
    """Check the distribution named on the command line."""
    name, *brought = sys.argv[1:]
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
    waiting = sum(not _imports(found, brought) for found in modules)
    points = list(distribution.entry_points)
    for point in points:
        point.load()
    print(
        f"{name} {distribution.version}: {len(modules) + 1} modules, {len(points)} entry points"
        + (f"; {waiting} modules wait for {', '.join(brought)}" if waiting else "")
    )


if __name__ == "__main__":
    main()
