"""Numeric formats on Gaudi."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import PrecisionPolicy, UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.precision import (
    AutocastPrecision,
    ScaledAutocastPrecision,
    make_precision,
)
from torch import nn

from drivetrain_hpu import FACTS, PRECISIONS
from drivetrain_hpu.bridge import FAILURES, described, device_module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from drivetrain_interfaces import Precision

#: The vendor's engine for float8, by its name inside the Gaudi software.
ENGINE = "habana_frameworks.torch.hpex.experimental.transformer_engine"
#: Devices take float8 matrices whose sizes are multiples of it.
MULTIPLE = 16
#: What ``get_device_name()`` says of the first generation, which has neither float16 nor float8.
FIRST_GENERATION = "GAUDI"


def precision(name: str) -> Precision:
    """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
    if name not in PRECISIONS:
        raise UnsupportedError(
            f"The 'hpu' backend was asked for precision {name!r}, which it does not declare.",
            f"Use one of: {listed(PRECISIONS)}.",
        )
    if name == "fp8":
        return HpuFloat8Precision()
    if name == "16-mixed":
        return HpuHalfPrecision(FACTS.autocast_type)
    return make_precision(name, FACTS.autocast_type)


class HpuHalfPrecision(ScaledAutocastPrecision):
    """``"16-mixed"``, which the first generation of Gaudi does not have."""

    def convert(self, module: nn.Module) -> nn.Module:
        """The module as it is. Raises ``UnsupportedError`` on a device without float16."""
        _need_second_generation(self.name)
        return super().convert(module)


@dataclass(frozen=True)
class Recipe:
    """How tensors are scaled before they are rounded to float8.

    The defaults of the vendor's class changed between releases, so each field is passed on.

    Attributes:
        margin: The scale is smaller by so many powers of two.
        interval: Steps between new scales.
        fp8_format: ``"E4M3"``, ``"E5M2"``, or ``"HYBRID"``: E4M3 forward and E5M2 backward.
        amax_history_len: Steps of which the largest elements are remembered.
        amax_compute_algo: ``"max"`` of those, or the ``"most_recent"``.
        reduce_amax: Whether ranks agree on the largest elements.
    """

    margin: int = 0
    interval: int = 16
    fp8_format: str = "HYBRID"
    amax_history_len: int = 1
    amax_compute_algo: str = "most_recent"
    reduce_amax: bool = False


class HpuFloat8Precision(AutocastPrecision):
    """``"fp8"``: linear layers in float8 while training, the rest as in ``"bf16-mixed"``.

    Layers are replaced by the vendor's and keep their parameters, as the same objects; those whose
    sizes are no multiples of 16 stay. Evaluation computes in bfloat16.

    Args:
        recipe: How tensors are scaled.
    """

    name = "fp8"
    policy = PrecisionPolicy(compute="bfloat16")

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(FACTS.autocast_type)
        self._recipe = recipe or Recipe()
        self._engine: Any = None
        self._made: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings: the vendor's objects are made in the process that uses them."""
        return {**self.__dict__, "_engine": None, "_made": None}

    def convert(self, module: nn.Module) -> nn.Module:
        """The module with its linear layers replaced.

        Raises:
            UnsupportedError: The device has no float8, or the vendor's engine does not import.
        """
        _need_second_generation(self.name)
        self._engine = _engine()
        settings = self._recipe
        formats = self._engine.recipe.Format
        self._made = self._engine.recipe.DelayedScaling(
            margin=settings.margin,
            interval=settings.interval,
            fp8_format=getattr(formats, settings.fp8_format),
            amax_history_len=settings.amax_history_len,
            amax_compute_algo=settings.amax_compute_algo,
            reduce_amax=settings.reduce_amax,
        )
        return replaced(module, self._engine.Linear)

    def forward(self) -> AbstractContextManager[Any]:
        """Autocast, and float8 inside of it where gradients are recorded."""
        if self._engine is None:
            return super().forward()
        return self._both(super().forward())

    @contextmanager
    def _both(self, autocast: AbstractContextManager[Any]) -> Iterator[None]:
        training = torch.is_grad_enabled()
        with autocast, self._engine.fp8_autocast(enabled=training, fp8_recipe=self._made):
            yield


def replaced(module: nn.Module, kind: Any) -> nn.Module:
    """The module with layers of the vendor's ``kind`` in place of its linear ones.

    A new layer gets the old one's parameters, so that trained weights stay, and so do optimizers.
    """
    if _fits(module):
        return _as_engine_layer(module, kind)
    for part in module.modules():
        for name, child in part.named_children():
            if _fits(child):
                setattr(part, name, _as_engine_layer(child, kind))
    return module


def _fits(part: nn.Module) -> bool:
    # Not subclasses: what they add to a linear layer would be lost.
    return type(part) is nn.Linear and not (
        part.in_features % MULTIPLE or part.out_features % MULTIPLE
    )


def _as_engine_layer(layer: Any, kind: Any) -> nn.Module:
    made: nn.Module = kind(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        params_dtype=layer.weight.dtype,
        skip_weight_param_allocation=True,
    )
    made.weight = layer.weight
    made.bias = layer.bias
    made.train(layer.training)
    return made


def _engine() -> Any:
    try:
        return import_module(ENGINE)
    except FAILURES as error:
        raise UnsupportedError(
            f"Precision 'fp8' was asked for, and its engine {ENGINE} does not import: "
            f"{described(error)}.",
            "Install the vendor's transformer engine of the same release, or use 'bf16-mixed'.",
        ) from error


def _need_second_generation(name: str) -> None:
    found = device_module().get_device_name()
    if found == FIRST_GENERATION:
        raise UnsupportedError(
            f"Precision {name!r} was asked for on a device that calls itself {found!r}, the first "
            "generation of Gaudi, which lacks that format.",
            "Use 'bf16-mixed'.",
        )
