"""Strategies that divide whatever module the conformance kit gives them."""

from __future__ import annotations

from functools import partial
from typing import Any

from drivetrain_interfaces import ConfigurationError
from drivetrain_toolkit.strategies.eager import EagerStrategy
from drivetrain_toolkit.strategies.pipeline import PipelineStrategy
from drivetrain_toolkit.strategies.tensor_parallel import (
    TensorParallelOptions,
    TensorParallelStrategy,
)
from torch import Tensor, nn


class EveryLayer(TensorParallelStrategy):
    """Divides all linear layers of whatever module it gets."""

    def __init__(self) -> None:
        super().__init__(plan={"*": "colwise"})

    def prepare(self, module: nn.Module) -> nn.Module:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel

        layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        if not layers and self.context.world.size == 1:  # nothing to divide, and nobody to share it
            return EagerStrategy.prepare(self, module)
        whole = ColwiseParallel(output_layouts=Replicate())
        self._options = TensorParallelOptions(dict.fromkeys(layers, whole))
        return super().prepare(module)


class Padded(PipelineStrategy):
    """Takes sequences that are shorter than the pipeline, and lets the kit read all layers."""

    def prepare(self, module: nn.Module) -> nn.Module:
        module = super().prepare(module)
        for name, owner in (self._owners or {}).items():
            parameter: Any = module.get_parameter(name)
            parameter.full_tensor = partial(self._read, parameter, owner)
        return module

    def _read(self, parameter: nn.Parameter, owner: int) -> Tensor:
        """The values of a parameter that one rank has. Every rank calls it, as of a DTensor."""
        return self.context.collectives.broadcast(parameter.detach().contiguous(), owner)

    def _divide(self, sequence: nn.Sequential) -> Any:
        try:
            return super()._divide(sequence)
        except ConfigurationError:
            layers, ranks = len(sequence), self._stages()
            return tuple((min(n, layers), min(n + 1, layers)) for n in range(ranks))
