"""What is under test: a backend, and the strategy that it is tested with."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from drivetrain_interfaces import (
    BackendSpec,
    Capabilities,
    DrivetrainError,
    Feature,
    StepHook,
    StrategySpec,
)
from drivetrain_interfaces.discovery import BACKENDS, STRATEGIES, registrations, single
from drivetrain_interfaces.errors import listed

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend, Strategy, StrategyContext

T = TypeVar("T")

#: The variables of this process before any spec was imported, which may change them.
STARTED_WITH = dict(os.environ)

#: What tests need and refuse: an ability, a moment inside a step, or a precision by name.
Ability = Feature | StepHook | str


class TargetError(Exception):
    """What was named on the command line cannot be tested at all."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object that was named on the command line.

    Attributes:
        value: The object.
        reference: Where it is, as ``module:object``.
        owner: Distribution and version, or that it is not installed.
        distribution: The distribution alone, where it is known.
        entry_point: The name it is registered under, where it was found by that.
    """

    value: Any
    reference: str
    owner: str
    distribution: str | None = None
    entry_point: str | None = None

    @property
    def module(self) -> str:
        """The module that holds the object."""
        return self.reference.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Target:
    """A backend under test, and the strategy it is tested with.

    Attributes:
        backend: Where the backend's spec was found.
        strategy: Where the strategy's spec was found, if it has a package of its own.
        strategy_name: The strategy that was asked for; None stands for the backend's own.
    """

    backend: Found
    strategy: Found | None = None
    strategy_name: str | None = None

    @property
    def spec(self) -> BackendSpec:
        """The backend's spec."""
        assert isinstance(self.backend.value, BackendSpec)
        return self.backend.value

    @property
    def strategy_spec(self) -> StrategySpec | None:
        """The strategy's spec, if it has one of its own."""
        return self.strategy.value if self.strategy else None

    @property
    def capabilities(self) -> Capabilities:
        """What both the backend and the strategy declare."""
        mine = self.spec.capabilities_of(self.strategy_name or "")
        return mine.meet(self.strategy_spec.capabilities) if self.strategy_spec else mine

    @property
    def one_device_strategy(self) -> str:
        """The strategy that one process is tested with."""
        return self.strategy_name or self.spec.facts.one_device_strategy

    @property
    def several_devices_strategies(self) -> tuple[str, ...]:
        """The strategies that several processes are tested with."""
        alone = self.spec.facts.one_device_strategy
        if self.strategy_name:
            both = alone == self.spec.facts.several_devices_strategy
            return () if self.strategy_name == alone and not both else (self.strategy_name,)
        several = self.spec.facts.several_devices_strategy
        return tuple(
            name
            for name in self.spec.strategies
            if (name != alone or name == several) and self._in_several_processes(name)
        )

    def _in_several_processes(self, name: str) -> bool:
        """Whether a strategy takes them, if the backend has any that does."""
        several = Feature.SEVERAL_PROCESSES
        return several in self.spec.capabilities_of(name) or several not in self.spec.capabilities

    def declares(self, ability: Ability) -> bool:
        """Whether this ability is declared."""
        declared = self.capabilities
        if isinstance(ability, Feature):
            return ability in declared
        if isinstance(ability, StepHook):
            return ability in declared.hooks
        return ability in declared.precisions

    def make_strategy(self, backend: Backend, name: str, context: StrategyContext) -> Strategy:
        """The strategy of that name, bound to this process."""
        if self.strategy_spec is not None and name == self.strategy_name:
            return self.strategy_spec.load()(context)
        return backend.strategy(name, context)


def find_target(backend: str, strategy: str | None = None) -> Target:
    """What the command line names.

    Args:
        backend: A registered name, or ``module:object``.
        strategy: One of the backend's strategies, a registered one, or ``module:object``.

    Raises:
        TargetError: There is no such thing, or it is something else.
    """
    found = _find(BACKENDS, backend, BackendSpec)
    spec: BackendSpec = found.value
    if strategy is None or strategy in spec.strategies:
        return Target(found, None, strategy)
    extra = _find(STRATEGIES, strategy, StrategySpec)
    if not extra.value.runs_on(spec.facts):
        raise TargetError(
            f"The strategy {strategy!r} of {extra.owner} runs on {listed(extra.value.device_types)}"
            f", and the backend {backend!r} has {spec.facts.device_type!r} devices."
        )
    return Target(found, extra, extra.value.name)


def _find(group: str, text: str, kind: type[T]) -> Found:
    found = _import(text) if ":" in text else _registered(group, text)
    if not isinstance(found.value, kind):
        raise TargetError(
            f"{text!r} is a {type(found.value).__name__}, and the kit tests a {kind.__name__}."
        )
    return found


def _registered(group: str, name: str) -> Found:
    claims = registrations(group)
    if name not in claims:
        raise TargetError(
            f"No installed package registers {name!r} in {group!r} (registered: {listed(claims)}). "
            "Install it, or name an object as module:object."
        )
    try:
        claim = single(group, name, claims[name])
        value = claim.load()
    except DrivetrainError as error:
        raise TargetError(str(error)) from error
    distribution = claim.point.dist.name if claim.point.dist else None
    return Found(value, claim.point.value, claim.owner, distribution, name)


def _import(text: str) -> Found:
    module_name, _, path = text.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in path.split("."):
            value = getattr(value, part)
    except Exception as error:
        raise TargetError(f"{text!r} could not be had: {type(error).__name__}: {error}.") from error
    owners = metadata.packages_distributions().get(module_name.partition(".")[0], [])
    if len(set(owners)) != 1:
        return Found(value, text, f"{module_name} (not installed)")
    return Found(value, text, f"{owners[0]} {metadata.version(owners[0])}", owners[0])


def add_to_path(directory: str) -> None:
    """Let ``module:object`` be found in the directory that the kit was started in."""
    if directory not in sys.path:
        sys.path.append(directory)
