"""Fixtures: installing pretend packages, and the repository's budgets."""

from __future__ import annotations

import itertools
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def budgets() -> dict[str, Any]:
    """The contents of ``ci/budgets.toml``."""
    return tomllib.loads((ROOT / "ci/budgets.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], list[str]]:
    """The messages that ``ci/messages`` records for a code as readers see them, in order."""

    def read(code: str) -> list[str]:
        text = (ROOT / f"ci/messages/{code}.txt").read_text(encoding="utf-8")
        rendered = text.partition("# as written")[0].partition("\n")[2]
        return rendered.strip("\n").split("\n\n")

    return read


class Site:
    """A folder on ``sys.path`` into which distributions can be put, as an installer would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, group: str, points: dict[str, str], version: str = "1.0") -> None:
        """Write the metadata of a distribution that registers ``points`` in ``group``."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        lines = [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def module(self, source: str) -> str:
        """Write a module; returns its name, which no other test uses."""
        name = f"pretend_{next(_NUMBERS)}"
        (self.folder / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    def points(self, group: str) -> list[metadata.EntryPoint]:
        """The entry points of this folder alone."""
        found = sorted(metadata.distributions(path=[str(self.folder)]), key=lambda d: d.name)
        return [p for dist in found for p in dist.entry_points if p.group == group]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    return Site(tmp_path)


SPEC = """
from drivetrain_interfaces import BackendSpec, Capabilities, ContractVersion, DeviceFacts, Probe

def probe():
    {probe}

spec = BackendSpec(
    name={name!r},
    contract=ContractVersion({major}, {minor}),
    capabilities=Capabilities(),
    facts=DeviceFacts("acme", "gloo", "cpu"),
    strategies=("single_device",),
    probe=probe,
    load=lambda: None,
)
"""


@pytest.fixture
def backend_module(site: Site) -> Callable[..., str]:
    """Writes a module with a backend's spec; returns the entry point's value."""

    def write(
        name: str, *, contract: tuple[int, int] = (0, 1), probe: str = "return Probe(2)"
    ) -> str:
        source = SPEC.format(name=name, major=contract[0], minor=contract[1], probe=probe)
        return f"{site.module(source)}:spec"

    return write
