"""Durations as users write them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING

from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

_CLOCK = re.compile(r"(\d+):(\d+):(\d+):(\d+)")


def seconds_of(duration: timedelta | Mapping[str, float] | str) -> float:
    """A duration in seconds.

    Args:
        duration: A ``timedelta``, its arguments as a mapping, or text ``"DD:HH:MM:SS"``.

    Raises:
        ConfigurationError: It is none of these.
    """
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, str):
        match = _CLOCK.fullmatch(duration.strip())
        if match:
            days, hours, minutes, seconds = map(int, match.groups())
            return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        try:
            return timedelta(**duration).total_seconds()
        except TypeError as error:
            raise _not_a_duration(duration) from error
    raise _not_a_duration(duration)


def _not_a_duration(value: object) -> ConfigurationError:
    return ConfigurationError(
        f"{value!r} is not a duration.",
        "Use a timedelta, its arguments such as {'hours': 2}, or text such as '00:02:00:00' "
        "for days, hours, minutes and seconds.",
    )
