"""Evaluation of a model of which each rank holds parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_deepspeed.shards import is_divided

if TYPE_CHECKING:
    from types import ModuleType

    from drivetrain_interfaces import EvalStep
    from torch import nn
    from typing_extensions import Self

#: Stands among the modules that use a parameter for as long as an evaluation lasts.
_EVALUATION = "evaluation"


class GatheredEvalStep:
    """An evaluation step that has the whole model from when it is entered until it is left.

    Entering gathers it, so every rank enters. A call waits for nobody, since nothing is missing.

    Args:
        step: What evaluates.
        module: The user's module.
        deepspeed: The package.
    """

    def __init__(self, step: EvalStep, module: nn.Module, deepspeed: ModuleType) -> None:
        self._step = step
        self._module = module
        self._deepspeed = deepspeed
        self._gathered: Any = None
        self._kept: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        """Evaluate one batch; returns what the user's function returned."""
        return self._step(*args)

    def __enter__(self) -> Self:
        parts: list[Any] = [p for p in self._module.parameters() if is_divided(p)]
        self._gathered = self._deepspeed.zero.GatheredParameters(parts, modifier_rank=None)
        self._gathered.__enter__()
        # The engine's hooks would let go of a layer after it was used, unless another uses it.
        self._kept = parts
        for parameter in parts:
            parameter.ds_active_sub_modules.add(_EVALUATION)
        self._step.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._step.__exit__(*exc)
        for parameter in self._kept:
            parameter.ds_active_sub_modules.discard(_EVALUATION)
        self._kept = []
        self._gathered.__exit__(None, None, None)
        self._gathered = None
