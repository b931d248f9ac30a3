"""How the module is placed and stepped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.errors import (
    ConfigurationError,
    DrivetrainError,
    NotFoundError,
    UnsupportedError,
    listed,
)

from drivetrain.deciding.draft import processes, strategy_names
from drivetrain.plan import Candidate

if TYPE_CHECKING:
    from drivetrain_interfaces.backend import BackendSpec, StrategySpec
    from drivetrain_interfaces.capabilities import Capabilities
    from drivetrain_interfaces.strategy import Strategy, StrategyContext, StrategyFactory

    from drivetrain.deciding.draft import Draft
    from drivetrain.deciding.places import Places


@dataclass(frozen=True, slots=True)
class FromBackend:
    """Makes a strategy that the backend itself brings."""

    spec: BackendSpec
    name: str

    def __call__(self, context: StrategyContext) -> Strategy:
        """Load the backend and build the strategy."""
        return self.spec.load().strategy(self.name, context)


@dataclass(frozen=True, slots=True)
class FromPackage:
    """Makes a strategy that a package of its own brings."""

    spec: StrategySpec

    def __call__(self, context: StrategyContext) -> Strategy:
        """Load the engine and build the strategy."""
        return self.spec.load()(context)


@dataclass(frozen=True, slots=True)
class AsItIs:
    """Returns a strategy that the user has built completely."""

    strategy: Strategy

    def __call__(self, context: StrategyContext) -> Strategy:
        """The user's strategy."""
        return self.strategy


@dataclass(frozen=True, slots=True)
class Engine:
    """A chosen strategy."""

    name: str
    factory: StrategyFactory
    capabilities: Capabilities


def choose_strategy(draft: Draft, spec: BackendSpec, places: Places | None) -> Engine | None:
    """The strategy, or None if there is none to be had."""
    ask = draft.asks.strategy
    if ask is not None and not isinstance(ask.value, str):
        return _own_strategy(draft, spec, ask.value, ask.by)
    if ask is None and places is None:
        return None
    facts = spec.facts
    if ask is not None:
        name, by = ask.value, ask.by
        evidence = [f"{name!r} was asked for"]
    else:
        several = places is not None and places.several
        name = facts.several_devices_strategy if several else facts.one_device_strategy
        by = "default"
        evidence = [f"{spec.name} uses it for {'several devices' if several else 'one device'}"]
    engine = _find_strategy(draft, spec, name, by)
    if engine is None:
        return None
    candidates = [Candidate(one, f"brought by {spec.name}") for one in spec.strategies]
    candidates += [
        Candidate(entry.name, _strategy_verdict(entry.spec, entry.problem, spec))
        for entry in draft.machine.inventory.strategies
    ]
    evidence += [f"{key}={value}" for key, value in draft.asks.options.items()]
    draft.decide("strategy", name, by, evidence, candidates)
    lonely = facts.one_device_strategy != facts.several_devices_strategy
    if places is not None and places.several and lonely and name == facts.one_device_strategy:
        draft.refuse(
            ConfigurationError(
                f"{by} was asked for, which uses one device, and there are "
                f"{len(places.devices)} devices and {processes(places.world_size)}.",
                f"Use devices=1, or strategy={facts.several_devices_strategy!r}.",
            ),
            "devices",
            "processes",
        )
    return engine


def _strategy_verdict(
    strategy: StrategySpec | None, problem: DrivetrainError | None, spec: BackendSpec
) -> str:
    if strategy is None:
        return f"skipped: {problem}"
    if spec.facts.own_strategies:
        return f"{spec.name} runs its own only"
    if not strategy.runs_on(spec.facts):
        return f"runs on {listed(strategy.device_types)} only"
    return "fits"


def _own_strategy(draft: Draft, spec: BackendSpec, value: Any, by: str) -> Engine | None:
    name = getattr(value, "name", None)
    name = name if isinstance(name, str) else type(value).__name__
    capabilities = spec.capabilities
    declared = getattr(value, "capabilities", None)
    if isinstance(declared, type(capabilities)):
        capabilities = capabilities.meet(declared)
    factory: StrategyFactory = value if callable(value) else AsItIs(value)
    draft.decide("strategy", name, by, (f"an object of {type(value).__name__} was passed",))
    return Engine(name, factory, capabilities)


def _find_strategy(draft: Draft, spec: BackendSpec, name: str, by: str) -> Engine | None:
    if name in spec.strategies:
        return Engine(name, FromBackend(spec, name), spec.capabilities_of(name))
    entry = next((one for one in draft.machine.inventory.strategies if one.name == name), None)
    if entry is None:
        draft.refuse(_unknown_strategy(draft, spec, name, by), "accelerator")
        return None
    if entry.spec is None:
        assert entry.problem is not None, "an entry without a spec has a problem"
        draft.refuse(entry.problem)
        return None
    if not entry.spec.runs_on(spec.facts):
        has = f"{spec.name!r} has {spec.facts.device_type!r} devices"
        if spec.facts.own_strategies:
            has = f"{spec.name!r} runs its own strategies only"
        draft.refuse(
            UnsupportedError(
                f"{by} was asked for; {entry.owner} runs on {listed(entry.spec.device_types)} "
                f"devices, and {has}.",
                f"Use another accelerator, or a strategy of {spec.name!r}: "
                f"{listed(spec.strategies)}.",
            ),
            "accelerator",
        )
        return None
    return Engine(name, FromPackage(entry.spec), spec.capabilities.meet(entry.spec.capabilities))


def _unknown_strategy(draft: Draft, spec: BackendSpec, name: str, by: str) -> DrivetrainError:
    names = strategy_names(draft)
    if name in names:
        return UnsupportedError(
            f"{by} was asked for; {names[name]} brings it, and not for {spec.name!r}.",
            f"Use one that {spec.name!r} has: {listed(spec.strategies)}.",
        )
    error = NotFoundError.named("strategy", name, ("auto", *sorted(names)))
    return NotFoundError(error.message, draft.hint("strategies", name) or error.hint)
