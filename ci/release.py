"""Prepare the release of one package: the version its fragments ask for, and its changelog.

``release.py cpu --dry-run`` says what would happen. Without ``--dry-run`` it writes the version and
the changelog, and prints the commands that commit, tag and open the next version.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]
#: Which part of the version a kind of fragment raises.
LEVEL = {"removal": 0, "feature": 1, "deprecation": 1, "bugfix": 2, "doc": 2, "trivial": 2}
ORDER = ("interfaces", "toolkit", "conformance", "a backend or strategy", "trainer")
VERSION = re.compile(r'^version = "(?P<version>[^"]+)"$', re.MULTILINE)


def kinds(changes: Path) -> list[str]:
    """The kinds of the fragments in a folder."""
    return sorted(path.name.split(".")[1] for path in changes.glob("*.md"))


def next_version(current: Version, found: list[str]) -> Version:
    """The version to release.

    Args:
        current: The version in the tree, which a release opened as ``X.Y.Z.dev0``. It is the
            smallest possible one, so that ``1.4.0.dev0`` with a feature is 1.4.0, not 1.5.0.
        found: Kinds of the fragments. Before 1.0 a removal raises the minor number.
    """
    if not found:
        raise SystemExit("There is no fragment, so there is nothing to release.")
    level = min(LEVEL[kind] for kind in found)
    if current.major == 0:
        level = max(level, 1)
    major, minor, micro = current.release
    if level == 0 and (minor or micro):
        major, minor, micro = major + 1, 0, 0
    elif level == 1 and micro:
        minor, micro = minor + 1, 0
    return Version(f"{major}.{minor}.{micro}")


def opened_after(released: Version) -> Version:
    """The version that the tree carries until the next release."""
    return Version(f"{released.major}.{released.minor}.{released.micro + 1}.dev0")


def write_version(pyproject: Path, version: Version) -> None:
    """Replace the static version of a package."""
    text = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(VERSION.sub(f'version = "{version}"', text, count=1), encoding="utf-8")


def changelog(folder: Path, version: Version, *, draft: bool) -> str:
    """Build the changelog with towncrier; returns what it says."""
    command = [
        sys.executable, "-m", "towncrier", "build", "--config", str(folder / "pyproject.toml"),
        "--dir", str(folder), "--version", str(version), "--date", str(dt.date.today()),
        "--draft" if draft else "--yes",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout


def commands(name: str, distribution: str, version: Version) -> list[str]:
    """What the one who releases runs next."""
    following = opened_after(version)
    return [
        f"git add packages/{name}",
        f"git commit -m 'Release {distribution} {version}'",
        f"git tag {distribution}-v{version}",
        f"python ci/release.py {name} --open {following}",
        f"git commit -am 'Open {distribution} {following}'",
    ]


def main() -> None:
    """Release, pretend to, or open the next version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", help="folder under packages/")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen")
    parser.add_argument("--open", type=Version, help="only write this version into the tree")
    arguments = parser.parse_args()
    folder = ROOT / "packages" / arguments.package
    pyproject = folder / "pyproject.toml"
    if not pyproject.exists():
        raise SystemExit(f"There is no package {arguments.package!r} in packages/.")
    if arguments.open:
        write_version(pyproject, arguments.open)
        return
    text = pyproject.read_text(encoding="utf-8")
    found = VERSION.search(text)
    name = re.search(r'^name = "([^"]+)"$', text, re.MULTILINE)
    if found is None or name is None:
        raise SystemExit(f"{pyproject} has no static name and version.")
    current = Version(found["version"])
    asked = kinds(folder / "changes")
    version = next_version(current, asked)
    print(f"{name[1]} {current} becomes {version}, because of: {', '.join(asked)}.")
    print(f"Packages are released in this order: {', '.join(ORDER)}.")
    print(changelog(folder, version, draft=arguments.dry_run))
    if not arguments.dry_run:
        write_version(pyproject, version)
    print("Then run:" if not arguments.dry_run else "Then one would run:")
    print("\n".join(f"  {line}" for line in commands(arguments.package, name[1], version)))


if __name__ == "__main__":
    main()
