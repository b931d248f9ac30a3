"""Strategies as the conformance kit can use them, which has modules of its own and no options.

``--drivetrain-strategy=kit_strategies:TP`` divides every linear layer by its outputs, and
``kit_strategies:PIPELINE`` lets ranks beyond the last layer pass on what they get. What they are is
in ``kit_layers``, since the module of a spec must not load torch.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from drivetrain_toolkit import specs

if TYPE_CHECKING:
    from drivetrain_interfaces import StrategyFactory


def _every_layer() -> StrategyFactory:
    factory: StrategyFactory = import_module("kit_layers").EveryLayer()
    return factory


def _padded() -> StrategyFactory:
    factory: StrategyFactory = import_module("kit_layers").Padded()
    return factory


TP = replace(specs.TP, load=_every_layer)
PIPELINE = replace(specs.PIPELINE, load=_padded)
