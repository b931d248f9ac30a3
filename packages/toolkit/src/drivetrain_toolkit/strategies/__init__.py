"""How a module is placed, wrapped and stepped. The rules are in docs/contracts/strategy.md.

A strategy object is a factory: calling it with a ``StrategyContext`` returns a copy that is bound
to this process. So an object made by the user, also of a subclass, can be passed around and pickled
before there is any device.

Each strategy has a module of its own, which is imported when one of its names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain_toolkit.strategies.ddp import DDPStrategy as DDPStrategy
    from drivetrain_toolkit.strategies.ddp2 import DDP2Strategy as DDP2Strategy
    from drivetrain_toolkit.strategies.dp import DataParallelStrategy as DataParallelStrategy
    from drivetrain_toolkit.strategies.eager import EagerStrategy as EagerStrategy
    from drivetrain_toolkit.strategies.eager import SingleDeviceStrategy as SingleDeviceStrategy
    from drivetrain_toolkit.strategies.fsdp import FSDPStrategy as FSDPStrategy
    from drivetrain_toolkit.strategies.fsdp import Zero2Strategy as Zero2Strategy
    from drivetrain_toolkit.strategies.pipeline import PipelineStrategy as PipelineStrategy
    from drivetrain_toolkit.strategies.remote import RPCStrategy as RPCStrategy
    from drivetrain_toolkit.strategies.tensor_parallel import (
        TensorParallelStrategy as TensorParallelStrategy,
    )
    from drivetrain_toolkit.strategies.zero1 import Zero1Strategy as Zero1Strategy

_HOME = {
    "DDP2Strategy": "ddp2",
    "DDPStrategy": "ddp",
    "DataParallelStrategy": "dp",
    "PipelineStrategy": "pipeline",
    "RPCStrategy": "remote",
    "EagerStrategy": "eager",
    "FSDPStrategy": "fsdp",
    "SingleDeviceStrategy": "eager",
    "TensorParallelStrategy": "tensor_parallel",
    "Zero1Strategy": "zero1",
    "Zero2Strategy": "fsdp",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - the names that are imported above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
