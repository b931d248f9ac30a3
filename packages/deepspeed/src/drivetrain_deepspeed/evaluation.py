"""Evaluation of a model of which each rank holds parts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from drivetrain_deepspeed.shards import is_divided, waits_in_a_file

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
        self._gathered = ExitStack()
        self._kept: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        """Evaluate one batch; returns what the user's function returned."""
        return self._step(*args)

    def __enter__(self) -> Self:
        parts: list[Any] = [p for p in self._module.parameters() if is_divided(p)]
        gather = self._deepspeed.zero.GatheredParameters
        in_files = [p for p in parts if waits_in_a_file(p)]
        in_memory = [p for p in parts if not waits_in_a_file(p)]
        self._gathered.enter_context(gather(in_memory, modifier_rank=None))
        for parameter in in_files:  # there are buffers for few of them at once
            self._gathered.enter_context(gather([parameter], modifier_rank=None))
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
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
        self._gathered.close()
