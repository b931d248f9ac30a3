"""Every class name of the two documents that this project implements, resolved when it is used.

``from drivetrain.plugins import DDPPlugin`` imports the package that brings it and nothing else;
where that package is missing or too old, the error says what to install. The names come from one
table, ``names.json``; ``dir(drivetrain.plugins)`` lists them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.errors import BrokenPackageError, NotFoundError

from drivetrain.names import installed_distributions, table, what_to_install

if TYPE_CHECKING:
    from collections.abc import Mapping


def __getattr__(name: str) -> Any:
    entry = table()["classes"].get(name)
    if entry is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _resolve(name, entry)
    globals()[name] = value  # made once, so that it is the same class every time, and pickles
    return value


def __dir__() -> list[str]:
    return sorted(table()["classes"])


def _resolve(name: str, entry: Mapping[str, Any]) -> Any:
    installed = dict(installed_distributions())
    todo = what_to_install(entry, installed)
    distribution = entry["distribution"]
    if todo:
        raise NotFoundError(
            f"drivetrain.plugins.{name} comes with {distribution} {entry['since']}, and "
            f"{installed.get(distribution) or 'no release of it'} is installed.",
            todo,
        )
    module, _, attribute = entry["target"].partition(":")
    try:
        target = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BrokenPackageError(
            f"drivetrain.plugins.{name} is {entry['target']!r} of {distribution} "
            f"{installed[distribution]}, and importing that raised {type(error).__name__}: "
            f"{error}.",
            f"Reinstall {distribution}, or upgrade drivetrain to a release that matches it.",
        ) from error
    return _preset(name, target, entry["preset"]) if "preset" in entry else target


def _preset(name: str, base: type, preset: Mapping[str, Any]) -> type:
    """A subclass with other defaults, under the name of the table.

    Args:
        name: Its name in this module.
        base: The class it specialises.
        preset: Class attributes, such as the launcher that a strategy wants.
    """
    text = ", ".join(f"{key}={value!r}" for key, value in preset.items())
    doc = f"``{base.__name__}`` with {text}."
    return type(name, (base,), {"__module__": __name__, "__doc__": doc, **preset})
