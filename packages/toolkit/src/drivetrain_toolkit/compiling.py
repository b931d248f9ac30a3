"""``torch.compile`` of what a step computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn


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
        outside: Methods of the network that are called and not compiled: those that take notes,
            which would be compiled again for every state of the notes.
    """

    backend: str = "inductor"
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None
    outside: tuple[str, ...] = ("log", "log_dict")

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
        del arguments["outside"]
        compiled: Callable[..., Any] = torch.compile(function, **arguments)
        return compiled

    def leave_out(self, module: nn.Module) -> tuple[str, ...]:
        """Set aside the methods that are not to be compiled; returns their names."""
        found = tuple(name for name in self.outside if callable(getattr(module, name, None)))
        for name in found:
            method = getattr(module, name)
            module.__dict__[name] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return found
