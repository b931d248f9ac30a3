"""What a spec says about itself is complete, and agrees with what the installer was told."""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
from drivetrain_interfaces import (
    CONTRACT,
    Capabilities,
    ConfigurationError,
    ContractVersion,
    DeviceFacts,
    Feature,
    Probe,
    StepHook,
)

from drivetrain_conformance.outcomes import BY_DECLARATION, NOT_HERE
from drivetrain_conformance.support.messages import refused

if TYPE_CHECKING:
    from drivetrain_interfaces import BackendSpec, StrategySpec

    from drivetrain_conformance.target import Found, Target


def test_the_contract_is_served(target: Target) -> None:
    """The contract that a package was written for is one that is installed here.

    R: B3
    """
    specs: list[BackendSpec | StrategySpec] = [target.spec]
    if target.strategy_spec is not None:
        specs.append(target.strategy_spec)
    for spec in specs:
        assert isinstance(spec.contract, ContractVersion), (
            f"B3: a spec states its contract as a ContractVersion; {spec.name} states "
            f"{spec.contract!r}"
        )
        assert CONTRACT.serves(spec.contract), (
            f"B3: a spec states the contract it was written for, which drivetrain-interfaces here "
            f"({CONTRACT}) must serve; {spec.name} states {spec.contract}"
        )


def test_the_entry_point_has_the_name_of_the_spec(target: Target) -> None:
    """What users write is what is registered.

    R: B2
    """
    found = [part for part in (target.backend, target.strategy) if part and part.entry_point]
    if not found:
        pytest.skip(f"{BY_DECLARATION}given as module:object, which has no entry point")
    for part in found:
        assert part.entry_point == part.value.name, (
            f"B2: the name of a spec equals the name of its entry point; {part.owner} registers "
            f"{part.value.name!r} as {part.entry_point!r}"
        )


def test_the_installer_was_told_the_same_contract(target: Target) -> None:
    """The lower bound of drivetrain-interfaces is the contract that the spec states.

    R: B3
    """
    parts = [part for part in (target.backend, target.strategy) if part and part.distribution]
    if not parts:
        pytest.skip(f"{NOT_HERE}the backend is not installed, so that it has no metadata")
    for part in parts:
        bound = lower_bound(part)
        contract = part.value.contract
        assert bound == (contract.major, contract.minor), (
            f"B3: the lower bound of drivetrain-interfaces in the package's metadata states the "
            f"same version as the spec; {part.owner} states {bound} there and {contract} in it"
        )


def lower_bound(part: Found) -> tuple[int, int] | None:
    """Major and minor of the lowest drivetrain-interfaces that a distribution takes."""
    assert part.distribution is not None
    for requirement in metadata.requires(part.distribution) or []:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and re.sub(r"[-_.]+", "-", name.group()).lower() == "drivetrain-interfaces":
            bound = re.search(r"(?:>=|~=|==)\s*(\d+)\.(\d+)", requirement)
            return (int(bound.group(1)), int(bound.group(2))) if bound else None
    return None


def test_capabilities_are_made_of_known_things(target: Target) -> None:
    """A misspelt ability would be neither tested nor refused.

    R: B4
    """
    declared = target.capabilities
    assert isinstance(declared, Capabilities), "B4: capabilities are a Capabilities object"
    strange: list[object] = [f for f in declared.features if not isinstance(f, Feature)]
    strange += [h for h in declared.hooks if not isinstance(h, StepHook)]
    assert not strange, (
        f"B4: features are Feature members and hooks StepHook members, not {strange}"
    )
    assert declared.precisions, "B4: at least one precision is declared"
    assert all(isinstance(name, str) and name for name in declared.precisions), (
        f"B4: precisions are names; these are {declared.precisions}"
    )


def test_the_strategies_that_the_facts_name_are_declared(spec: BackendSpec) -> None:
    """The core picks a strategy by the facts alone.

    R: B5
    """
    facts = spec.facts
    assert isinstance(facts, DeviceFacts), "B5: facts are a DeviceFacts object"
    assert facts.one_device_strategy in spec.strategies, (
        f"B5: the strategy for one device is one of the backend's; {facts.one_device_strategy!r} "
        f"is not in {spec.strategies}"
    )
    if Feature.SEVERAL_PROCESSES in spec.capabilities:
        assert facts.several_devices_strategy in spec.strategies, (
            f"B5: the strategy for several devices is one of the backend's; "
            f"{facts.several_devices_strategy!r} is not in {spec.strategies}"
        )


def test_the_facts_are_complete(spec: BackendSpec) -> None:
    """The core has no table of its own to fall back on.

    R: B5, A3, A4
    """
    facts = spec.facts
    for name in (
        "device_type",
        "autocast_type",
        "several_devices_launcher",
        "interactive_launcher",
    ):
        value = getattr(facts, name)
        assert isinstance(value, str), f"B5: the fact {name} is a text; it is {value!r}"
        assert value, f"B5: the fact {name} is stated; it is empty"
    assert facts.default_devices >= 0, (
        f"A3: default_devices is how many devices 'auto' means, or 0 for all; it is "
        f"{facts.default_devices}"
    )
    if Feature.SEVERAL_PROCESSES in spec.capabilities:
        assert facts.collective_backend, "B5: a backend of several processes names its collectives"


def test_the_priority_leaves_room(spec: BackendSpec) -> None:
    """Automatic selection compares numbers.

    R: B6
    """
    assert isinstance(spec.priority, int), f"B6: priority is a number; it is {spec.priority!r}"
    assert 0 <= spec.priority <= 100, (  # noqa: PLR2004 - 50 is usual
        f"B6: priority is between 0 and 100, and 50 is usual; it is {spec.priority}"
    )


def test_the_probe_is_complete(found_devices: Probe) -> None:
    """A plan quotes what the probe says.

    R: B9
    """
    assert isinstance(found_devices, Probe), f"B8: probe() returns a Probe, not {found_devices!r}"
    assert isinstance(found_devices.devices, int), "B9: a probe counts devices"
    assert found_devices.devices >= 0, f"B9: a probe counts devices; {found_devices.devices}"
    if not found_devices.devices:
        assert found_devices.reason.strip(), (
            "B9: with no device, the probe says why and what to install; its reason is empty"
        )
    if found_devices.names:
        assert len(found_devices.names) == found_devices.devices, (
            f"B9: a probe names all of its {found_devices.devices} devices, or none; it names "
            f"{found_devices.names}"
        )


def test_parsing_devices_is_pure(spec: BackendSpec) -> None:
    """A plan can be made where the devices are not.

    R: B7
    """
    elsewhere = Probe(devices=3, names=("first", "second", "third"))
    for request in ("auto", -1, 1, 2, "2"):
        answers = [spec.parse_devices(request, elsewhere, spec.name) for _ in range(2)]
        assert answers[0] == answers[1], (
            f"B7: the same request and probe give the same answer; devices={request!r} gave "
            f"{answers}"
        )
        assert isinstance(answers[0], tuple), "B7: parse_devices returns a tuple of indices"
        assert answers[0], f"B7: devices={request!r} means some device; it gave none"
        assert all(type(index) is int and index >= 0 for index in answers[0]), (
            f"B7: parse_devices returns indices; devices={request!r} gave {answers[0]}"
        )
    number = spec.parse_devices(2, elsewhere, spec.name)
    assert len(number) == 2, (  # noqa: PLR2004 - two were asked for
        f"B7: a number of devices is that many; devices=2 of 3 gave {number}"
    )


@pytest.mark.parametrize(
    "request_",
    [0, -2, "no-such-device", [], None, 1.5],
    ids=["0", "-2", "name", "[]", "None", "1.5"],
)
def test_a_meaningless_request_for_devices_is_refused(spec: BackendSpec, request_: object) -> None:
    """A typing error must not become a default.

    R: B7
    """
    with refused(
        ConfigurationError,
        naming=re.escape(repr(request_)),
        rule=f"B7: devices={request_!r} is refused with a ConfigurationError that quotes it",
    ):
        spec.parse_devices(request_, Probe(devices=3), spec.name)
