"""What a hardware package registers: a cheap, torch-free description, and a factory behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from drivetrain_interfaces.devices import parse_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces.accelerator import Accelerator, DeviceFacts
    from drivetrain_interfaces.capabilities import Capabilities
    from drivetrain_interfaces.checkpoint import CheckpointIO
    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.collectives import Collectives
    from drivetrain_interfaces.contract import ContractVersion
    from drivetrain_interfaces.launcher import Launcher
    from drivetrain_interfaces.precision import Precision
    from drivetrain_interfaces.strategy import Strategy, StrategyContext, StrategyFactory


#: Among the device types of a strategy: every family whose facts say ``eager``.
EAGER: Final = "eager"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend found on this machine. Taking it opens no device and never raises.

    Attributes:
        devices: How many devices there are; 0 means that the backend cannot run here.
        reason: Why there are none, and what to install. Empty when there are some.
        names: Names of the devices, in order, where they have any (models, UUIDs).
    """

    devices: int
    reason: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """The object behind an entry point of the group ``drivetrain.backends``.

    The module that holds it imports neither torch nor the vendor's library.

    Attributes:
        name: What users ask for in ``accelerator=``. Equal to the entry point's name.
        contract: The contract the package was written for.
        capabilities: What it can do.
        facts: What its devices are like.
        strategies: Names of the strategies that ``Backend.strategy`` can make.
        probe: Says what this machine has.
        load: Imports the vendor and returns the backend.
        priority: ``accelerator="auto"`` takes the available backend with the highest.
        parse_devices: From what the user asked and the probe to device indices; raises
            ``ConfigurationError``. Pure, so that a plan can be made without the device.
        strategy_capabilities: What those of its strategies can do that lack an ability which the
            backend declares for others; by name.
    """

    name: str
    contract: ContractVersion
    capabilities: Capabilities
    facts: DeviceFacts
    strategies: tuple[str, ...]
    probe: Callable[[], Probe]
    load: Callable[[], Backend]
    priority: int = 50
    parse_devices: Callable[[Any, Probe, str], tuple[int, ...]] = field(default=parse_devices)
    strategy_capabilities: Mapping[str, Capabilities] = field(default_factory=dict, hash=False)

    def capabilities_of(self, strategy: str) -> Capabilities:
        """What one of its strategies can do, which is no more than the backend declares."""
        own = self.strategy_capabilities.get(strategy)
        return self.capabilities if own is None else self.capabilities.meet(own)


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """The object behind an entry point of the group ``drivetrain.strategies``.

    Attributes:
        name: What users ask for in ``strategy=``. Equal to the entry point's name.
        contract: The contract the package was written for.
        device_types: The device types that it runs on; ``EAGER`` among them stands for all that
            torch runs operation by operation.
        capabilities: What it can do; a run has what both it and the backend can.
        load: Imports the engine and returns the factory.
        one_process: Whether one process drives all devices of a machine; its options then hold
            their indices under ``"devices"``.
    """

    name: str
    contract: ContractVersion
    device_types: frozenset[str]
    capabilities: Capabilities
    load: Callable[[], StrategyFactory]
    one_process: bool = False

    def runs_on(self, facts: DeviceFacts) -> bool:
        """Whether it runs on a family of devices with these facts."""
        if facts.own_strategies:
            return False
        return facts.device_type in self.device_types or (
            facts.eager and EAGER in self.device_types
        )


@runtime_checkable
class Backend(Protocol):
    """Factories only. Each returns a new object and keeps none."""

    def accelerator(self) -> Accelerator:
        """The accelerator of this process."""
        ...

    def precision(self, name: str) -> Precision:
        """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
        ...

    def collectives(self, world: World) -> Collectives:
        """Communication for this process; with several, connects them."""
        ...

    def strategy(self, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name. Raises ``UnsupportedError`` for one that is not declared."""
        ...

    def launcher(self, name: str) -> Launcher | None:
        """The backend's own launcher of that name, or None to use the shared one."""
        ...

    def checkpoint_io(self) -> CheckpointIO:
        """The checkpoint IO that suits these devices."""
        ...
