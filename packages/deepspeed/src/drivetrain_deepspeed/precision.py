"""Precisions of which the engine does the arithmetic: it keeps the float32 copy and the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain_interfaces import ConfigurationError, PrecisionPolicy
from drivetrain_toolkit.precision import FullPrecision, TruePrecision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


class DeepSpeedPrecision(FullPrecision):
    """How the engine stores parameters. It does backward, scaling and the update itself.

    In half precision the engine keeps a copy of the parameters in float32, which is what an update
    changes, and in float16 it scales the loss.

    Args:
        precision: ``"32-true"``, ``"bf16-true"`` or ``"16-true"``.

    Raises:
        ConfigurationError: Another precision.
    """

    _NAMES: ClassVar[Mapping[str, str]] = {
        "32": "32-true",
        "32-true": "32-true",
        "bf16": "bf16-true",
        "bf16-true": "bf16-true",
        "16": "16-true",
        "16-true": "16-true",
    }

    def __init__(self, precision: str | int = "32-true") -> None:
        name = self._NAMES.get(str(precision))
        if name is None:
            raise ConfigurationError(
                f"{type(self).__name__}({precision!r}) was asked for, and the engine stores "
                "parameters in '32-true', 'bf16-true' or '16-true'.",
                "Use one of these, or set precision= of the trainer.",
            )
        self.name = name
        if name == "16-true":
            self.policy = PrecisionPolicy("float16", "float16", "float16", loss_scaling=True)
        elif name == "bf16-true":
            self.policy = PrecisionPolicy("bfloat16", "bfloat16", "bfloat16")

    def convert(self, module: nn.Module) -> nn.Module:
        """The module with its parameters cast, and inputs cast where they meet them."""
        return module if self.name == "32-true" else TruePrecision(self.name).convert(module)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the scale is the engine's, and is saved with the optimizer."""
        return {}
