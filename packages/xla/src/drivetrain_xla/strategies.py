"""How a module is placed on XLA devices."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import torch
import torch_xla
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_toolkit.strategies import SingleDeviceStrategy

from drivetrain_xla import device_module
from drivetrain_xla.runtime import open_runtime
from drivetrain_xla.steps import XlaEvalStep, XlaManualStep, XlaTrainStep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        ModelState,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from torch import nn
    from typing_extensions import Self

#: Where a module keeps what a strategy divided of it.
PARTS: Final = "_drivetrain_xla_parts"


@dataclass(frozen=True)
class XlaOptions:
    """Options that every strategy here takes."""

    compile_step: bool = False
    max_graphs: int = 4


class XlaStrategy(SingleDeviceStrategy):
    """One process, one device: everything of an update is one graph.

    Args:
        compile_step: Insist on that: a step that needs a value before its end is an error.
        max_graphs: How many different graphs of it there may then be.
    """

    name = "single_device"

    _options: XlaOptions

    def __init__(self, *, compile_step: bool = False, max_graphs: int = 4) -> None:
        self._options = XlaOptions(compile_step, max_graphs)

    def __call__(self, context: StrategyContext) -> Self:
        """A bound copy. Opens the runtime, one device at a time unless it is open already.

        Raises:
            UnsupportedError: There are several processes.
            UnavailableError: The runtime does not open.
        """
        strategy = super().__call__(context)
        open_runtime()
        return strategy

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move, and seed the device's generator from the host's, which is left as it is.

        ``torch.manual_seed`` does not reach XLA devices. So the same seed before ``prepare`` gives
        the same dropout, other numbers on each rank.

        Raises:
            UnsupportedError: Synchronized batch normalization was asked for.
        """
        module = super().prepare(module)
        rank = self.context.world.rank
        origin = bytes(torch.get_rng_state().tolist()) + rank.to_bytes(4, "little")
        device_module.manual_seed(zlib.crc32(origin))
        torch_xla.sync()
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            UnsupportedError: An optimizer is fused.
            ConfigurationError: An optimizer was built before the module was moved.
        """
        self._take(spec.optimizers)
        options = self._options
        return XlaTrainStep(
            spec,
            self.context.precision,
            max_graphs=options.max_graphs if options.compile_step else 0,
        )

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Raises ``UnsupportedError`` for inference mode."""
        if spec.inference_mode:
            raise UnsupportedError(
                "An evaluation under torch.inference_mode was asked for, in which torch fails on "
                "XLA devices.",
                "Use inference_mode=False, which is torch.no_grad.",
            )
        return XlaEvalStep(spec, self.context.precision)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step; errors are those of ``train_step``."""
        self._take(spec.optimizers)
        return XlaManualStep(spec, self.context.precision)

    def state(self) -> ModelState:
        """The whole state as copies on the host."""
        torch_xla.sync()  # one graph for all that is not computed yet, not one for each tensor
        return super().state()

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state; ``CheckpointError`` names what does not fit."""
        super().load(state, strict=strict)
        torch_xla.sync()  # so that copies are no part of the first step's graph

    def _configure(self, options: Mapping[str, Any]) -> None:
        try:
            self._options = replace(self._options, **options)
        except TypeError as error:
            raise ConfigurationError(
                f"The strategy {self.name!r} was given the options {sorted(options)}; it takes "
                f"{sorted(item.name for item in fields(self._options))}.",
                "Leave out the others.",
            ) from error
        if self._options.compile_step and self._options.max_graphs < 1:
            raise ConfigurationError(
                f"max_graphs={self._options.max_graphs!r} was asked for.", "Give 1 or more."
            )

    def _make_whole(self, module: nn.Module) -> None:
        super()._make_whole(module)
        if parts := vars(module).pop(PARTS, None):
            parts.undo()

    def _take(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        _refuse_fused(optimizers)
        _refuse_left_behind(optimizers)
        self._optimizers = tuple(optimizers)

    def _with_sync_batchnorm(self, module: nn.Module) -> nn.Module:
        raise UnsupportedError(
            "Synchronized batch normalization was asked for, which torch does not offer on 'xla' "
            "devices.",
            "Set sync_batchnorm=False, or use group or layer normalization.",
        )


def _refuse_fused(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        if any(group.get("fused") for group in optimizer.param_groups):
            raise UnsupportedError(
                f"{type(optimizer).__name__}(fused=True) was asked for, and torch has no fused "
                "kernel for XLA devices.",
                "Leave fused out: XLA fuses the whole update.",
            )


def _refuse_left_behind(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Stop optimizers of parameters that are none of the module's since it was moved."""
    for optimizer in optimizers:
        behind = [
            tuple(p.shape)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.device.type != device_module.NAME
        ]
        if behind:
            raise ConfigurationError(
                f"{type(optimizer).__name__} was built before the module was moved to an XLA "
                f"device: {len(behind)} of its parameters, the first of shape {behind[0]}, stayed "
                "behind.",
                "Build it from what prepare returned, such as in configure_optimizers.",
            )
