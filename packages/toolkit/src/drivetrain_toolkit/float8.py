"""Matrix products in float8, by torchao."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import PrecisionPolicy, UnsupportedError
from torch import nn

from drivetrain_toolkit.precision import AutocastPrecision

if TYPE_CHECKING:
    from collections.abc import Callable

#: Devices take float8 matrices whose sizes are multiples of it.
MULTIPLE = 16


def _no_problem() -> str:
    return ""


class Float8Precision(AutocastPrecision):
    """``"fp8"``: parameters in float32, linear layers in float8, the rest as in ``"bf16-mixed"``.

    Layers whose sizes are no multiples of 16 compute in bfloat16. Each tensor is scaled by its
    largest element before it is rounded to float8, so the loss needs no scale.

    Args:
        autocast_type: The device type that ``torch.autocast`` wants.
        problem: Says in the process that trains why its device has no float8; empty if it has.
        emulate: Compute in higher precision what float8 would give. Slow; for tests.
    """

    name = "fp8"
    #: What comes out of a product; what goes in has been rounded to float8.
    policy = PrecisionPolicy(compute="bfloat16")

    def __init__(
        self,
        autocast_type: str,
        *,
        problem: Callable[[], str] = _no_problem,
        emulate: bool = False,
    ) -> None:
        super().__init__(autocast_type)
        self._problem = problem
        self._emulate = emulate

    def convert(self, module: nn.Module) -> nn.Module:
        """The module with its linear layers replaced; parameters stay the same objects.

        Raises:
            UnsupportedError: The device has no float8, or torchao is not installed.
        """
        problem = "" if self._emulate else self._problem()
        if problem:
            raise UnsupportedError(
                f"Precision 'fp8' was asked for, and {problem}.", "Use 'bf16-mixed'."
            )
        ao = _torchao()
        layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
        if layers and not any(_fits(part) for part in layers):
            warnings.warn(
                f"Precision 'fp8' was asked for, and none of {len(layers)} linear layers has sizes "
                f"that are multiples of {MULTIPLE}: all compute in bfloat16.",
                stacklevel=2,
            )
            return module
        converted: nn.Module = ao.convert_to_float8_training(
            module,
            module_filter_fn=lambda part, _name: (
                _fits(part) and not isinstance(part, ao.float8_linear.Float8Linear)
            ),
            config=ao.Float8LinearConfig(emulate=self._emulate),
        )
        return converted


def _fits(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and not (
        part.in_features % MULTIPLE or part.out_features % MULTIPLE
    )


def _torchao() -> Any:
    try:
        ao = import_module("torchao.float8")
        import_module("torchao.float8.float8_linear")
    except ImportError as error:
        raise UnsupportedError(
            f"Precision 'fp8' was asked for, and it needs torchao, which does not import: {error}.",
            f"Install torchao in a version for torch {torch.__version__}, or use 'bf16-mixed'.",
        ) from error
    return ao
