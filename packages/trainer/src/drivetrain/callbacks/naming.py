"""File names of checkpoints: a template with counters and metrics, and versions of taken names."""

from __future__ import annotations

import os
from string import Formatter
from typing import TYPE_CHECKING

from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EXTENSION = ".ckpt"
ABSENT = "none"
COUNTERS = ("epoch", "step")


def check_template(template: str) -> None:
    """Refuse a template that can never become a file name.

    Raises:
        ConfigurationError: Braces do not match, a field has no name, or it holds a separator.
    """
    hint = "Use a name such as '{epoch}-{step}-{val_loss:.2f}'; dirpath takes the directory."
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigurationError(
            f"The checkpoint filename {template!r} is not a template ({error}).", hint
        ) from error
    literal = "".join(text for text, *_ in Formatter().parse(template))
    if not template or "" in fields or os.sep in literal or "/" in literal:
        raise ConfigurationError(
            f"The checkpoint filename {template!r} is not a name with named fields.", hint
        )
    try:
        fill(template, dict.fromkeys(fields, 1.0) | dict.fromkeys(COUNTERS, 1))
    except ValueError as error:
        raise ConfigurationError(
            f"The checkpoint filename {template!r} has a format that does not fit ({error}).", hint
        ) from error


def missing_fields(template: str, values: Mapping[str, float]) -> list[str]:
    """The fields of a template that have no value."""
    fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    return [field for field in fields if field not in values]


def fill(template: str, values: Mapping[str, float], *, insert_names: bool = True) -> str:
    """The file name, without extension.

    Args:
        template: Text with fields such as ``{step}`` or ``{val_loss:.2f}``.
        values: Counters and metrics by name. A metric without a value becomes ``none``.
        insert_names: Whether ``{step}`` becomes ``step=5`` rather than ``5``.
    """
    parts = []
    for literal, field, spec, _ in Formatter().parse(template):
        parts.append(literal)
        if field is None:
            continue
        name = f"{field.replace('/', '_').replace(os.sep, '_')}=" if insert_names else ""
        value = values.get(field)
        if value is None:
            parts.append(f"{name}{ABSENT}")
        else:
            parts.append(name + format(value, spec or ("" if isinstance(value, int) else ".6g")))
    return "".join(parts)


def free_path(directory: str, name: str, taken: Callable[[str], bool]) -> str:
    """The first of ``name.ckpt``, ``name-v1.ckpt``, … that is not taken."""
    path = os.path.join(directory, name + EXTENSION)
    version = 0
    while taken(path):
        version += 1
        path = os.path.join(directory, f"{name}-v{version}{EXTENSION}")
    return path
