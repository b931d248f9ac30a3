"""``torch.compile`` of what a step computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class CompileOptions:
    """The arguments of ``torch.compile``.

    Attributes:
        backend: What generates code; ``"eager"`` and ``"aot_eager"`` generate none, for looking for
            the cause of a problem.
        mode: Such as ``"reduce-overhead"`` or ``"max-autotune"``; None is torch's default.
        fullgraph: Whether a break in the graph is an error.
        dynamic: Whether shapes may change; None lets torch find out.
        options: For the backend; excludes ``mode``.
    """

    backend: str = "inductor"
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.options is not None:
            raise ConfigurationError(
                f"CompileOptions(mode={self.mode!r}, options=...) was asked for, and torch takes "
                "one of them.",
                "Leave one out.",
            )

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled when it is first called."""
        arguments = {key: value for key, value in asdict(self).items() if value is not None}
        compiled: Callable[..., Any] = torch.compile(function, **arguments)
        return compiled
