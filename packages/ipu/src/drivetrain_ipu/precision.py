"""Numeric formats as a traced step needs them: casts that are part of the program.

An IPU has no autocast, and makes products of mixed operands in float32. So what is to be made in
float16 is cast, function by function, while the step is traced.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import PrecisionPolicy, UnsupportedError
from drivetrain_interfaces.errors import listed
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.optim import Optimizer

#: Functions that multiply, in each of the ways in which they are written.
PRODUCTS: frozenset[Any] = frozenset(
    {
        functional.linear,
        functional.bilinear,
        functional.scaled_dot_product_attention,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.addbmm,
        torch.baddbmm,
        torch.einsum,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.mm,
        Tensor.bmm,
        Tensor.addmm,
        Tensor.addbmm,
        Tensor.baddbmm,
    }
)
#: Where activations meet other parameters.
NORMS: frozenset[Any] = frozenset(
    {
        functional.batch_norm,
        functional.layer_norm,
        functional.group_norm,
        functional.instance_norm,
        functional.prelu,
    }
)


class IpuPrecision:
    """``"32-true"``: what the user built, and the base of the other two."""

    name = "32-true"
    policy = PrecisionPolicy()

    def convert(self, module: nn.Module) -> nn.Module:
        """The module as it is."""
        return module

    def forward(self) -> AbstractContextManager[Any]:
        """A context that changes nothing."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Refused: backward is a part of the program. Raises ``UnsupportedError``."""
        raise self._refusal("backward")

    def step(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Refused: so is the update. Raises ``UnsupportedError``."""
        raise self._refusal("an update")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a loss scale is a constant here."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Anything, which is ignored, as from a precision with a loss scale."""

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"Precision {self.name!r} of the 'ipu' backend was asked for {what} on the host.",
            "Use the strategy 'ipu', whose program holds backward and update.",
        )


class HalfPrecision(IpuPrecision):
    """``"16-true"``: parameters, buffers of norms apart, and products in float16."""

    name = "16-true"
    policy = PrecisionPolicy(parameters="float16", compute="float16", reduce="float16")

    def convert(self, module: nn.Module) -> nn.Module:
        """Cast floating parameters and buffers in place; running statistics stay in float32."""
        kept = {
            (layer, name): buffer
            for layer in module.modules()
            if isinstance(layer, torch.nn.modules.batchnorm._NormBase)  # noqa: SLF001 - has no other name
            for name, buffer in layer.named_buffers(recurse=False)
        }
        module = module.half()
        for (layer, name), buffer in kept.items():
            setattr(layer, name, buffer)
        return module

    def forward(self) -> AbstractContextManager[Any]:
        """A context in which floating tensors are cast where they meet parameters in float16."""
        return _MeetInHalf()


class MixedPrecision(IpuPrecision):
    """``"16-mixed"``: parameters in float32, products in float16."""

    name = "16-mixed"
    policy = PrecisionPolicy(compute="float16")

    def convert(self, module: nn.Module) -> nn.Module:
        """The module as it is. Raises ``UnsupportedError`` if parameters are in float16."""
        halves = [name for name, p in module.named_parameters() if p.dtype is torch.float16]
        if halves:
            raise UnsupportedError(
                f"Precision '16-mixed' keeps parameters in float32, and {halves[0]!r} is float16.",
                "Build the module in float32, or use '16-true'.",
            )
        return module

    def forward(self) -> AbstractContextManager[Any]:
        """A context in which products are made in float16, and losses in float32."""
        return _ProductsInHalf()


def make_precision(name: str) -> IpuPrecision:
    """The precision of that name. Raises ``UnsupportedError`` if there is none."""
    makers = {each.name: each for each in (IpuPrecision, HalfPrecision, MixedPrecision)}
    if name not in makers:
        raise UnsupportedError(
            f"The 'ipu' backend was asked for precision {name!r}, which it does not declare.",
            f"Use one of: {listed(makers)}.",
        )
    return makers[name]()


class _Casting(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        dtype = self.wanted(func, args, kwargs or {})
        if dtype is None:
            return func(*args, **(kwargs or {}))
        return func(*_cast(args, dtype), **_cast(kwargs or {}, dtype))

    def wanted(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.dtype | None:
        """What the arguments are cast to; None leaves them."""
        raise NotImplementedError


class _MeetInHalf(_Casting):
    def wanted(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.dtype | None:
        if func in PRODUCTS:
            found = [v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            return torch.float16 if torch.float16 in found else None
        if (
            func in NORMS
            and args
            and isinstance(args[0], Tensor)
            and args[0].dtype is torch.float32
        ):
            weights = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor)]
            if any(v.dtype is torch.float16 for v in weights):
                return None if func is functional.batch_norm else torch.float16
        return None


class _ProductsInHalf(_Casting):
    def wanted(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> torch.dtype | None:
        if func in PRODUCTS:
            return torch.float16
        return torch.float32 if func in _IN_FLOAT32 else None


#: Functions whose results need float32's range or precision.
_IN_FLOAT32: frozenset[Any] = frozenset(
    {
        functional.binary_cross_entropy,
        functional.cosine_embedding_loss,
        functional.ctc_loss,
        functional.hinge_embedding_loss,
        functional.kl_div,
        functional.l1_loss,
        functional.margin_ranking_loss,
        functional.mse_loss,
        functional.multilabel_margin_loss,
        functional.nll_loss,
        functional.poisson_nll_loss,
        functional.smooth_l1_loss,
        functional.triplet_margin_loss,
    }
)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        floating = value.dtype in {torch.float32, torch.float16}
        return value.to(dtype) if floating and value.dtype is not dtype else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
