"""What is in the wheels that were built, before anybody installs them.

``closure NAME`` prints the wheel of a package and those of the packages of this tree that it
declares; ``check NAME`` looks inside its wheel.
"""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DIST = ROOT / "build/dist"


def project(name: str) -> dict[str, object]:
    """The ``[project]`` table of the package in ``packages/<name>``."""
    path = ROOT / "packages" / name / "pyproject.toml"
    table: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return table


def wheel_of(distribution: str) -> Path:
    """The one wheel of a distribution."""
    found = sorted(DIST.glob(f"{distribution.replace('-', '_')}-[0-9]*.whl"))
    if len(found) != 1:
        raise SystemExit(f"{DIST} holds {len(found)} wheels of {distribution}. Run nox -s wheels.")
    return found[0]


def read(wheel: Path, ending: str) -> str:
    """The one file of a wheel whose path ends so; empty when there is none."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        return archive.read(names[0]).decode() if names else ""


def requirements(wheel: Path) -> list[str]:
    """Names of the distributions that a wheel needs without any extra."""
    metadata = HeaderParser().parsestr(read(wheel, ".dist-info/METADATA"))
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    return [re.split(r"[^A-Za-z0-9._-]", need)[0] for need in needs]


def closure(name: str) -> list[Path]:
    """The wheel of a package and of every package of this tree that it needs, directly or not."""
    ours = {str(project(path.name)["name"]) for path in (ROOT / "packages").iterdir()}
    wanted = [str(project(name)["name"])]
    for distribution in wanted:
        needs = requirements(wheel_of(distribution))
        wanted += [need for need in needs if need in ours and need not in wanted]
    return [wheel_of(distribution) for distribution in wanted]


def faults(name: str) -> list[str]:
    """What is missing from, or too much in, the wheel of a package."""
    table = project(name)
    distribution = str(table["name"])
    module = distribution.replace("-", "_")
    wheel = wheel_of(distribution)
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    found = [
        f"it has no {wanted}"
        for wanted in (f"{module}/__init__.py", f"{module}/py.typed")
        if wanted not in names
    ]
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    if read(wheel, ".dist-info/licenses/LICENSE") != license_text:
        found.append("its LICENSE is missing or not that of the repository")
    extra = {path.split("/")[0] for path in names} - {module}
    found += [f"it installs {path}" for path in sorted(extra) if not path.endswith(".dist-info")]
    source = ROOT / "packages" / name / "src"
    files = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    shipped = {f.as_posix() for f in files if not any(p[0] in "._" for p in f.parts[:-1])}
    found += [f"it lacks {path}" for path in sorted(shipped - set(names))]
    points = ConfigParser(delimiters=("=",))
    points.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    points.read_string(read(wheel, ".dist-info/entry_points.txt"))
    declared = dict(table.get("entry-points", {}))  # type: ignore[call-overload]
    if "scripts" in table:
        declared["console_scripts"] = table["scripts"]
    if {group: dict(points[group]) for group in points.sections()} != declared:
        found.append("its entry points are not those of pyproject.toml")
    return found


def main() -> None:
    """Run the command that was given."""
    command, name = sys.argv[1:]
    if command == "closure":
        print("\n".join(str(path) for path in closure(name)))
        return
    found = faults(name)
    for fault in found:
        print(f"{wheel_of(str(project(name)['name'])).name}: {fault}")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
