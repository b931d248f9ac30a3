"""What is installed, found by entry points, without importing more than was asked for.

One package that is broken, too new, or claims a name twice costs one line in a report and nothing
else: every other package goes on working.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from drivetrain_interfaces.backend import BackendSpec, Probe, StrategySpec
from drivetrain_interfaces.contract import CONTRACT, ContractVersion
from drivetrain_interfaces.errors import (
    BrokenPackageError,
    ContractMismatchError,
    DrivetrainError,
    NotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

BACKENDS = "drivetrain.backends"
STRATEGIES = "drivetrain.strategies"
ENVIRONMENTS = "drivetrain.environments"
LAUNCHERS = "drivetrain.launchers"
MANAGERS = "drivetrain.managers"
SUBMITTERS = "drivetrain.submitters"

#: Claims by group, and what was there when they were read. Reading all that is installed takes some
#: milliseconds, and a start asks more than a dozen times.
_KNOWN: dict[str, tuple[tuple[Any, ...], dict[str, tuple[Registration, ...]]]] = {}

T = TypeVar("T")
Spec = TypeVar("Spec", BackendSpec, StrategySpec)


@dataclass(frozen=True, slots=True)
class Registration:
    """One entry point: a name that a distribution claims in a group. Not imported yet."""

    name: str
    owner: str
    point: metadata.EntryPoint

    def load(self) -> Any:
        """Import and return the object. Raises ``BrokenPackageError`` if that fails."""
        try:
            return self.point.load()
        except DrivetrainError:
            raise
        except Exception as error:
            raise BrokenPackageError(
                f"{self.owner} registers {self.name!r} as {self.point.value!r}, and importing that "
                f"raised {type(error).__name__}: {error}.",
                f"Reinstall or uninstall {self.owner.split()[0]}, or report it to its owner.",
            ) from error


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One backend of an inventory.

    Attributes:
        name: What users ask for.
        owner: Distribution and version.
        spec: The loaded spec, or None when it was not looked at or could not be had.
        probe: What the machine has, or None when it was not probed.
        problem: Why there is no spec or no probe, as an error that can be raised.
    """

    name: str
    owner: str
    spec: BackendSpec | None = None
    probe: Probe | None = None
    problem: DrivetrainError | None = None


@dataclass(frozen=True, slots=True)
class StrategyEntry:
    """One strategy package of an inventory; fields as in ``BackendEntry``."""

    name: str
    owner: str
    spec: StrategySpec | None = None
    problem: DrivetrainError | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that a plan may choose from, as data."""

    backends: tuple[BackendEntry, ...] = ()
    strategies: tuple[StrategyEntry, ...] = ()
    environments: tuple[str, ...] = ()
    launchers: tuple[str, ...] = ()


def registrations(
    group: str, points: Iterable[metadata.EntryPoint] | None = None
) -> dict[str, tuple[Registration, ...]]:
    """All claims of a group by name. Imports nothing.

    Args:
        group: One of the group names of this module.
        points: Entry points to read instead of the installed ones.
    """
    if points is not None:
        return _claims(points)
    where, (then, known) = _where(), _KNOWN.get(group, ((), {}))
    if where != then:
        known = _claims(metadata.entry_points(group=group))
        _KNOWN[group] = where, known
    return dict(known)


def _where() -> tuple[Any, ...]:
    """What installing something changes: the search path, and when its folders changed."""
    return metadata.entry_points, *((folder, _changed(folder)) for folder in sys.path)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return 0


def _claims(points: Iterable[metadata.EntryPoint]) -> dict[str, tuple[Registration, ...]]:
    found: dict[str, tuple[Registration, ...]] = {}
    for point in points:
        owner = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
        claim = Registration(point.name, owner, point)
        found[point.name] = (*found.get(point.name, ()), claim)
    return dict(sorted(found.items()))


def single(group: str, name: str, claims: tuple[Registration, ...]) -> Registration:
    """The only claim to a name. Raises ``BrokenPackageError`` when several packages claim it."""
    if len(claims) > 1:
        owners = " and ".join(claim.owner for claim in claims)
        raise BrokenPackageError(
            f"{owners} both register {name!r} in the group {group!r}.",
            "Uninstall one of them.",
        )
    return claims[0]


def load(group: str, name: str, kind: type[T], *, what: str, package: str | None = None) -> T:
    """The object registered under ``name``, imported and checked to be of ``kind``.

    Args:
        group: The entry point group.
        name: The name that was asked for.
        kind: The class or runtime-checkable protocol that the object must satisfy.
        what: How messages call it, such as ``"launcher"``.
        package: The package to install if the name is unknown, where one is known.

    Raises:
        NotFoundError: Nobody registers the name.
        BrokenPackageError: Its import fails, it is something else, or two packages claim it.
        ContractMismatchError: It was written for a contract that is not served here.
    """
    claims = registrations(group)
    if name not in claims:
        raise NotFoundError.named(what, name, tuple(claims), package)
    return check(single(group, name, claims[name]), kind, what)


def check(claim: Registration, kind: type[T], what: str, host: ContractVersion = CONTRACT) -> T:
    """Import a claim and check its type and, where it states one, its contract."""
    value = claim.load()
    if not isinstance(value, kind):
        raise BrokenPackageError(
            f"{claim.owner} registers the {what} {claim.name!r} as a {type(value).__name__}, "
            f"not as a {kind.__name__}.",
            f"Report this to the owner of {claim.owner.split()[0]}.",
        )
    wanted = getattr(value, "contract", None)
    if isinstance(wanted, ContractVersion) and not host.serves(wanted):
        raise ContractMismatchError.between(claim.owner, wanted, host)
    return value


def load_backend(name: str, *, package: str | None = None) -> BackendSpec:
    """One backend's spec; imports that package's spec module and no other. Raises as ``load``."""
    return load(BACKENDS, name, BackendSpec, what="accelerator", package=package)


def load_strategy(name: str, *, package: str | None = None) -> StrategySpec:
    """One strategy package's spec. Raises as ``load``."""
    return load(STRATEGIES, name, StrategySpec, what="strategy", package=package)


def probed(spec: BackendSpec, owner: str) -> tuple[Probe | None, DrivetrainError | None]:
    """The probe of a spec, or the error that says which package's probe raised."""
    try:
        return spec.probe(), None
    except Exception as error:  # noqa: BLE001 - a broken probe is that package's line in a report
        broken = BrokenPackageError(
            f"{owner} could not probe for {spec.name!r} devices: "
            f"its probe raised {type(error).__name__}: {error}.",
            f"Report this to the owner of {owner.split(maxsplit=1)[0]}; a probe must never raise.",
        )
        broken.__cause__ = error
        return None, broken


def take_inventory(
    only: str | None = None,
    *,
    backends: Iterable[metadata.EntryPoint] | None = None,
    strategies: Iterable[metadata.EntryPoint] | None = None,
) -> Inventory:
    """List what is installed and probe it.

    Args:
        only: Import and probe this backend alone, as when the user named it; the others are listed
            by name. None imports and probes all.
        backends: Entry points to read instead of the installed ones.
        strategies: The same for strategies.
    """
    return Inventory(
        backends=tuple(
            _backend_entry(name, claims, look=only in (None, name))
            for name, claims in registrations(BACKENDS, backends).items()
        ),
        strategies=tuple(
            _strategy_entry(name, claims)
            for name, claims in registrations(STRATEGIES, strategies).items()
        ),
        environments=tuple(registrations(ENVIRONMENTS)),
        launchers=tuple(registrations(LAUNCHERS)),
    )


def _backend_entry(name: str, claims: tuple[Registration, ...], *, look: bool) -> BackendEntry:
    owner = " and ".join(claim.owner for claim in claims)
    if not look:
        return BackendEntry(name, owner)
    try:
        spec = check(single(BACKENDS, name, claims), BackendSpec, "accelerator")
    except DrivetrainError as problem:
        return BackendEntry(name, owner, problem=problem)
    probe, broken = probed(spec, owner)
    return BackendEntry(name, owner, spec=spec, probe=probe, problem=broken)


def _strategy_entry(name: str, claims: tuple[Registration, ...]) -> StrategyEntry:
    owner = " and ".join(claim.owner for claim in claims)
    try:
        spec = check(single(STRATEGIES, name, claims), StrategySpec, "strategy")
    except DrivetrainError as problem:
        return StrategyEntry(name, owner, problem=problem)
    return StrategyEntry(name, owner, spec=spec)
