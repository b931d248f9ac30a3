"""The table of names that other packages bring (``names.json``), and what to install for them.

It is data for messages and for ``drivetrain.plugins``. Nothing is chosen by it: what can run is
what is installed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known of a name that no installed package provides.

    Attributes:
        instead: A name that has taken its place, or empty.
        do: What the reader does to get it, as an instruction.
    """

    instead: str
    do: str


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The whole of ``names.json``, read once."""
    text = resources.files("drivetrain").joinpath("names.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, so that ``0.2.0.dev1`` counts as 0.2.0."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def installed_distributions() -> tuple[tuple[str, str], ...]:
    """Name and version of each distribution of the table that is installed."""
    known = {
        entry["distribution"]
        for section in table().values()
        for entry in (section.values() if isinstance(section, dict) else section)
        if "distribution" in entry
    }
    found = {name: version_of(name) for name in sorted(known)}
    return tuple((name, version) for name, version in found.items() if version)


def version_of(distribution: str) -> str:
    """The version of an installed distribution; empty when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def what_to_install(entry: Mapping[str, Any], installed: Mapping[str, str]) -> str:
    """The instruction that brings what ``entry`` describes; empty when it should be here already.

    Args:
        entry: An entry of the table, with a distribution and the release that brings the name.
        installed: Versions of the installed distributions.
    """
    name, since = entry["distribution"], entry["since"]
    if name not in installed:
        recent = "" if since == "0.1" else f" {since} or later"
        return f"Install {name}{recent}."
    if release(installed[name]) < release(since):
        return f"Upgrade {name} to {since} (installed: {installed[name]})."
    return ""


def hint_for(section: str, name: str, installed: Mapping[str, str]) -> Hint | None:
    """What the table knows of a name, or None.

    Args:
        section: ``"accelerators"``, ``"strategies"``, ``"environments"`` or ``"launchers"``.
        name: The name that was asked for.
        installed: Versions of the installed distributions.
    """
    entry = table()[section].get(name)
    if entry is None:
        return None
    if "removed" in entry:
        return Hint("", entry["removed"])
    instead = entry.get("instead", "")
    do = what_to_install(entry, installed)
    if instead:
        setting = {"accelerators": "accelerator", "strategies": "strategy"}.get(section, "")
        setting = setting or {"environments": "cluster_environment"}.get(section, "launcher")
        do = " ".join(part for part in (do, f"Use {setting}={instead!r}.") if part)
    return Hint(instead, do)
