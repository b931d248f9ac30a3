"""A process for each device: every one holds the whole module, and gradients are averaged.

One process for all devices (``spmd``) needs less of a machine; this is for code that was written
for ranks, and for what SPMD lacks.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from drivetrain_interfaces import UnsupportedError, UserCodeError
from drivetrain_toolkit.averaging import average_gradients
from drivetrain_toolkit.strategies import EagerStrategy
from drivetrain_toolkit.strategies.eager import broadcast_module

from drivetrain_xla import CAPABILITIES
from drivetrain_xla.runtime import open_runtime, spans
from drivetrain_xla.steps import XlaManualStep, XlaTrainStep
from drivetrain_xla.strategies import XlaStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from drivetrain_interfaces import (
        Collectives,
        ManualSpec,
        ManualStep,
        Precision,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from drivetrain_toolkit.steps import Update
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from typing_extensions import Self


class ReplicaStrategy(XlaStrategy):
    """One of several processes, with one device.

    Where XLA's runtime knows all ranks, as on TPUs, averaging is part of the step's graph. Where
    it does not, as on CPUs, gradients travel by way of the hosts.

    Args:
        compile_step: As in ``XlaStrategy``; for the first of these two only.
        max_graphs: As in ``XlaStrategy``.
    """

    name = "ddp"
    capabilities: ClassVar = CAPABILITIES["ddp"]

    #: Whether XLA's own collectives reach all ranks.
    _in_graph: bool

    def __call__(self, context: StrategyContext) -> Self:
        """A bound copy. Opens the runtime.

        Raises:
            UnsupportedError: This process has taken all devices as one.
            UnavailableError: The runtime does not open.
        """
        strategy = EagerStrategy.__call__(self, context)
        open_runtime()
        import torch_xla.runtime as xr

        if context.world.size > 1 and xr.is_spmd():
            raise UnsupportedError(
                f"The strategy {self.name!r} was asked for in a world of {context.world.size} "
                "processes, and this one has taken all its devices as one (SPMD).",
                "Unset XLA_USE_SPMD, or use strategy='spmd' in one process.",
            )
        strategy._in_graph = spans(context.world)  # noqa: SLF001 - our own copy
        return strategy

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move, and take over the parameters and buffers of rank 0, in place.

        Raises:
            UnsupportedError: Synchronized batch normalization was asked for.
        """
        module = super().prepare(module)
        if self.context.world.size > 1:
            broadcast_module(module, self.context.collectives)
            torch_xla.sync()
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            UnsupportedError: An optimizer is fused, or the step is to be one graph where it is not.
            ConfigurationError: An optimizer was built before the module was moved.
        """
        context = self.context
        if context.world.size == 1:
            return super().train_step(spec)
        self._take(spec.optimizers)
        options = self._options
        if options.compile_step and not self._in_graph:
            raise UnsupportedError(
                "compile_step=True was asked for, and gradients of "
                f"{context.world.size} processes travel by way of the hosts, between two graphs.",
                "Leave it out, or start the processes so that XLA's runtime knows all of them.",
            )
        average = average_in_graph if self._in_graph else average_on_hosts
        precision = _Averaging(
            context.precision, average(spec.optimizers, context.collectives, context.world.size)
        )
        return XlaTrainStep(
            spec,
            precision,
            max_graphs=options.max_graphs if options.compile_step else 0,
            no_sync=precision.accumulating,
            collectives=context.collectives,
            world_size=context.world.size,
            update=self._update(spec),
        )

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step, whose gradients travel by way of the hosts."""
        self._take(spec.optimizers)
        context = self.context
        several = context.world.size > 1
        return XlaManualStep(
            spec, context.precision, collectives=context.collectives if several else None
        )

    def _update(self, spec: StepSpec) -> Update | None:
        """What updates instead of the precision."""
        return None


def average_on_hosts(
    optimizers: Sequence[Optimizer], collectives: Collectives, size: int
) -> Callable[[], None]:
    """What averages gradients over ranks that XLA's runtime does not know."""
    del size
    parameters = _parameters(optimizers)

    def average() -> None:
        torch_xla.sync()  # forward and backward as one graph, whose results are sent then
        average_gradients(parameters, collectives)

    return average


def average_in_graph(
    optimizers: Sequence[Optimizer], collectives: Collectives, size: int
) -> Callable[[], None]:
    """What averages gradients by XLA's own collective, as a part of the graph.

    Which parameters have gradients is agreed on once, in the first window: graphs of all ranks must
    hold the same collectives. One that has none on some rank counts as zero there.
    """
    parameters = _parameters(optimizers)
    agreed: list[bool] = []

    def average() -> None:
        mine = [p.grad is not None for p in parameters]
        if not agreed:
            everywhere = collectives.all_gather(torch.tensor(mine, dtype=torch.uint8))
            agreed.extend(torch.stack(everywhere).amax(0).bool().tolist())
        if any(here and not known for here, known in zip(mine, agreed, strict=True)):
            raise UserCodeError(
                f"{sum(mine)} parameters have gradients in this window, some of which had none in "
                "the first.",
                "Let the loss reach the same parameters from the first window on, such as by "
                "adding 0 * parameter.sum(), or use strategy='spmd'.",
            )
        gradients = [_gradient(p) for p, known in zip(parameters, agreed, strict=True) if known]
        if gradients:
            xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1.0 / size)

    return average


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    found = {
        id(p): p for each in optimizers for group in each.param_groups for p in group["params"]
    }
    return list(found.values())


class _Averaging:
    """A precision whose last backward of a window is followed by the average over ranks."""

    def __init__(self, precision: Precision, average: Callable[[], None]) -> None:
        self._precision = precision
        self._average = average
        self._last = True

    def backward(self, loss: Tensor) -> None:
        """As that of the precision."""
        self._precision.backward(loss)
        if self._last:
            self._average()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Gradients that are computed in it stay here."""
        self._last = False
        try:
            yield
        finally:
            self._last = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._precision, name)
