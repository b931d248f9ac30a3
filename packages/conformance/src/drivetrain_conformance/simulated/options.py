"""What the simulated devices are like, and what goes wrong with them and when."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, get_args, get_type_hints

from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Options as JSON, such as ``{"devices": 4, "fp16": false}``; processes of a run inherit it.
VARIABLE = "DRIVETRAIN_SIMULATED"


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of all simulated devices. Every ``at`` counts from when it is set, from 1.

    Attributes:
        devices: How many there are. Fixed when they are installed.
        memory_limit: Bytes that each has; None is as much as the host has.
        fp16: Whether they have ``torch.float16``.
        inference_mode: Whether operators work in ``torch.inference_mode``.
        inplace: Whether operators may write over tensors while gradients of them are recorded.
            Copying always may, and an optimizer records nothing.
        latency_us: Microseconds that each launch takes besides its work.
        fail_at_launch: The launch at which a device fails, as do all later ones.
        hang_at_collective: The collective that waits until the group's timeout, and raises.
        drop_at_collective: The collective that raises at once; the other ranks lose this one.
        fault_rank: The only rank that the last three happen to; None is every rank.
    """

    devices: int = 2
    memory_limit: int | None = None
    fp16: bool = True
    inference_mode: bool = True
    inplace: bool = True
    latency_us: float = 0.0
    fail_at_launch: int | None = None
    hang_at_collective: int | None = None
    drop_at_collective: int | None = None
    fault_rank: int | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        problems = [
            (_misfit(item.name, value, str(item.type)), f"Give another {item.name}.")
            for item in fields(self)
            if not _fits(value := getattr(self, item.name), hints[item.name], _lowest(item.name))
        ]
        if problems:
            raise ConfigurationError.conflicts(problems)

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Options:
        """The options in the variable ``DRIVETRAIN_SIMULATED``; the defaults where it is not set.

        Raises:
            ConfigurationError: It is not JSON, or holds what is no option.
        """
        text = (os.environ if env is None else env).get(VARIABLE, "")
        if not text:
            return cls()
        try:
            given = json.loads(text)
            return cls(**given)
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"{VARIABLE}={text!r} does not hold options as a JSON object.",
                f"Use some of {[item.name for item in fields(cls)]}, as in "
                f"{VARIABLE}='{{\"devices\": 2}}'.",
            ) from error

    def to_environment(self) -> dict[str, str]:
        """The variable that gives another process these options."""
        return {VARIABLE: json.dumps(asdict(self))}


def _lowest(name: str) -> int:
    return 0 if name in {"fault_rank", "latency_us"} else 1


def _misfit(name: str, value: object, kind: str) -> str:
    kind = kind.removesuffix(" | None")
    least = "" if kind == "bool" else f" of at least {_lowest(name)}"
    return f"The simulated device was given {name}={value!r}, which is no {kind}{least}."


def _fits(value: object, hint: object, lowest: int) -> bool:
    kinds = get_args(hint) or (hint,)
    if value is None or isinstance(value, bool):
        return type(value) in kinds
    if not isinstance(value, (int, float)) or value < lowest:
        return False
    return float in kinds or (isinstance(value, int) and int in kinds)
