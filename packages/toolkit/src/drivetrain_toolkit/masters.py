"""Half precision with master weights: what is trained is float32, what is computed is float16.

This is what NVIDIA's apex called the level O2. There the module was float16 and the optimizer kept
float32 copies; here the parameters are the float32 ones, and each module that owns some computes
with float16 copies of them for the length of its forward. The update, what is saved, and what ranks
exchange are float32, and optimizers need to know nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import PrecisionPolicy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC2701 - the base that torch checks for

from drivetrain_toolkit.precision import NOTHING, ScaledAutocastPrecision, cast
from drivetrain_toolkit.trees import mapped

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class MasterWeightsPrecision(ScaledAutocastPrecision):
    """``"O2"``: parameters in float32, everything but batch normalization computed in float16.

    The loss is scaled, as in ``"16-mixed"``. What the module itself returns is float32 again.

    Args:
        autocast_type: The device type whose torch has loss scaling.
        init_scale: The first scale; for this and the others see ``ScaledAutocastPrecision``.
        growth_factor: What it grows by.
        backoff_factor: What it shrinks by.
        growth_interval: Finite updates in a row before it grows.
    """

    name = "O2"
    policy = PrecisionPolicy(compute="float16", loss_scaling=True)

    def convert(self, module: nn.Module) -> nn.Module:
        """Install the hooks that compute in float16. Parameters stay as they are.

        Raises:
            UnsupportedError: It has parameters in float16, or the device has no loss scaling.
        """
        module = super().convert(module)
        for part in module.modules():
            owns = any(p.is_floating_point() for p in part.parameters(recurse=False))
            if owns and not isinstance(part, _BatchNorm) and not _has(part, _Lend):
                part.register_forward_pre_hook(_Lend(self._dtype), prepend=True, with_kwargs=True)
                part.register_forward_hook(_give_back, always_call=True)
        if not _has_after(module, _ToFloat):
            module.register_forward_hook(_ToFloat())
        return module

    def forward(self) -> AbstractContextManager[Any]:
        """A context that changes nothing: the modules do it."""
        return NOTHING


def _has(module: nn.Module, kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in module._forward_pre_hooks.values())  # noqa: SLF001 - torch has no way to list them


def _has_after(module: nn.Module, kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in module._forward_hooks.values())  # noqa: SLF001


class _Lend:
    """Before a forward: copies in half precision stand where the parameters were."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = self.dtype
        # A module that calls itself has lent its parameters already; the outermost call gives back.
        lent = module.__dict__.setdefault("_lent", [])
        own: dict[str, Any] = module._parameters  # noqa: SLF001 - a parameter's place takes no other tensor by setattr
        lent.append(dict(own))
        for name, parameter in own.items():
            if parameter is not None and parameter.is_floating_point():
                own[name] = parameter.to(dtype)
        _follow(module)
        return (
            tuple(cast(value, dtype) for value in args),
            {key: cast(value, dtype) for key, value in kwargs.items()},
        )


def _give_back(module: nn.Module, _args: Any, _output: Any) -> None:
    """After a forward, also one that raised: the parameters are in their places again."""
    lent = module.__dict__["_lent"]
    module._parameters.update(lent.pop())  # noqa: SLF001
    if not lent:
        del module.__dict__["_lent"]
    _follow(module)


def _follow(module: nn.Module) -> None:
    """A recurrent module has a list of its parameters besides."""
    if isinstance(module, nn.RNNBase):
        names = module._flat_weights_names  # noqa: SLF001
        module._flat_weights = [getattr(module, name, None) for name in names]  # noqa: SLF001


class _ToFloat:
    """After the forward of the whole: results are float32 for a loss that is computed of them."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return mapped(output, _float)


def _float(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float() if value.dtype.itemsize < torch.float32.itemsize else value
    return value
