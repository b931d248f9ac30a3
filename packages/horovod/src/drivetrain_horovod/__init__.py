"""Horovod as a strategy: a spec that loads neither torch nor Horovod.

Horovod is at its end of life upstream; distributed data parallel is its successor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import Capabilities, ContractVersion, Feature, StrategySpec
from drivetrain_toolkit.specs import DDP_FEATURES

if TYPE_CHECKING:
    from drivetrain_interfaces import StrategyFactory

    from drivetrain_horovod.strategy import HorovodStrategy

__all__ = ["HorovodStrategy", "spec"]

#: Horovod reduces no bfloat16, so parameters and gradients are in another format.
PRECISIONS = frozenset({"32-true", "64-true", "16-mixed", "16-true", "bf16-mixed"})


def __getattr__(name: str) -> Any:
    if name != "HorovodStrategy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from drivetrain_horovod.strategy import HorovodStrategy

    return HorovodStrategy


def _load() -> StrategyFactory:
    from drivetrain_horovod.strategy import HorovodStrategy

    return HorovodStrategy()


# Not deterministic: which gradients travel together, and so the order of sums, depends on time.
spec = StrategySpec(
    name="horovod",
    contract=ContractVersion(0, 1),
    device_types=frozenset({"cpu", "cuda"}),
    capabilities=Capabilities(
        features=DDP_FEATURES - {Feature.CLOSURE, Feature.DETERMINISTIC}, precisions=PRECISIONS
    ),
    load=_load,
)
