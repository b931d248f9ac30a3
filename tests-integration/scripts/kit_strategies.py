"""Strategies as the conformance kit can use them, which has modules of its own and no options.

``--drivetrain-strategy=kit_strategies:TP`` divides every linear layer by its outputs, and
``kit_strategies:PIPELINE`` lets ranks beyond the last layer pass on what they get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from drivetrain_interfaces import ConfigurationError
from drivetrain_toolkit import specs
from drivetrain_toolkit.strategies.pipeline import PipelineStrategy
from drivetrain_toolkit.strategies.tensor_parallel import (
    TensorParallelOptions,
    TensorParallelStrategy,
)
from torch import nn


class EveryLayer(TensorParallelStrategy):
    """Divides all linear layers of whatever module it gets."""

    def __init__(self) -> None:
        super().__init__(plan={"*": "colwise"})

    def prepare(self, module: nn.Module) -> nn.Module:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel

        layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        whole = ColwiseParallel(output_layouts=Replicate())
        self._options = TensorParallelOptions(dict.fromkeys(layers, whole))
        return super().prepare(module)


class Padded(PipelineStrategy):
    """Takes sequences that are shorter than the pipeline."""

    def _divide(self, sequence: nn.Sequential) -> Any:
        try:
            return super()._divide(sequence)
        except ConfigurationError:
            layers, ranks = len(sequence), self._stages()
            return tuple((min(n, layers), min(n + 1, layers)) for n in range(ranks))


TP = replace(specs.TP, load=EveryLayer)
PIPELINE = replace(specs.PIPELINE, load=Padded)
