"""A strategy of a package of its own, for devices of the type ``cpu``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import Capabilities, ContractVersion, StrategySpec
from drivetrain_toolkit.specs import PRECISIONS, SINGLE_DEVICE_FEATURES

if TYPE_CHECKING:
    from drivetrain_interfaces import StrategyFactory


def _load() -> StrategyFactory:
    from drivetrain_toolkit.strategies import SingleDeviceStrategy

    class Lockstep(SingleDeviceStrategy):
        name = "lockstep"

    return Lockstep()


spec = StrategySpec(
    name="lockstep",
    contract=ContractVersion(0, 1),
    device_types=frozenset({"cpu"}),
    capabilities=Capabilities(features=SINGLE_DEVICE_FEATURES, precisions=PRECISIONS),
    load=_load,
)
