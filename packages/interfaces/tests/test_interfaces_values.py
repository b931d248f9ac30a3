"""The plain values: versions, capabilities, worlds, device requests."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from drivetrain_interfaces import (
    ALL_STEP_HOOKS,
    Capabilities,
    Clip,
    ConfigurationError,
    ContractVersion,
    DeviceFacts,
    Feature,
    LaunchPlan,
    LaunchRequest,
    ModelState,
    PrecisionPolicy,
    Probe,
    StepHook,
    StepHooks,
    StepResult,
    World,
)
from drivetrain_interfaces.devices import parse_devices
from drivetrain_interfaces.discovery import BackendEntry, Inventory, StrategyEntry


@pytest.mark.parametrize(
    ("host", "wanted", "served"),
    [
        ((0, 1), (0, 1), True),
        ((0, 2), (0, 1), False),  # before 1.0 every minor may break
        ((0, 1), (0, 2), False),
        ((1, 0), (0, 9), False),
        ((1, 3), (1, 3), True),
        ((1, 4), (1, 3), True),
        ((1, 2), (1, 3), False),
        ((2, 0), (1, 9), False),
        ((1, 9), (2, 0), False),
    ],
)
def test_a_host_serves_its_major_up_to_its_minor(
    host: tuple[int, int], wanted: tuple[int, int], *, served: bool
) -> None:
    assert ContractVersion(*host).serves(ContractVersion(*wanted)) is served


def test_contract_versions_sort_as_numbers_and_print_short() -> None:
    assert ContractVersion(1, 10) > ContractVersion(1, 9)
    assert str(ContractVersion(1, 10)) == "1.10"


def test_two_capabilities_meet_in_what_both_have() -> None:
    backend = Capabilities(
        features=frozenset({Feature.ACCUMULATION, Feature.CLIP_NORM}),
        precisions=frozenset({"32-true", "bf16-mixed"}),
    )
    strategy = Capabilities(
        features=frozenset({Feature.CLIP_NORM, Feature.SEVERAL_PROCESSES}),
        precisions=frozenset({"32-true", "16-mixed"}),
        hooks=frozenset({StepHook.BEFORE_BACKWARD}),
    )
    both = backend.meet(strategy)
    assert both == strategy.meet(backend)
    assert both.features == {Feature.CLIP_NORM}
    assert both.precisions == {"32-true"}
    assert both.hooks == {StepHook.BEFORE_BACKWARD}


def test_what_is_missing_is_listed_in_a_fixed_order() -> None:
    declared = Capabilities(features=frozenset({Feature.CLIP_NORM}))
    assert Feature.CLIP_NORM in declared
    assert Feature.CLOSURE not in declared
    wanted = [Feature.CLOSURE, Feature.ACCUMULATION, Feature.CLIP_NORM]
    assert declared.missing(wanted) == (Feature.ACCUMULATION, Feature.CLOSURE)
    assert declared.missing([]) == ()
    assert declared.hooks == ALL_STEP_HOOKS


NAMED = Probe(4, names=("a0", "a1", "b0", "b1"))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("auto", (0, 1, 2, 3)),
        (-1, (0, 1, 2, 3)),
        ("-1", (0, 1, 2, 3)),
        (1, (0,)),
        ("2", (0, 1)),
        (4, (0, 1, 2, 3)),
        ([2, 0], (2, 0)),
        ((3,), (3,)),
        ("1, 3", (1, 3)),
        ("1,", (1,)),
        (["1", "b1"], (1, 3)),
        ("b0", (2,)),
        ("a1,b0", (1, 2)),
    ],
)
def test_device_requests_that_are_understood(request_: object, expected: tuple[int, ...]) -> None:
    assert parse_devices(request_, NAMED, "npu") == expected


@pytest.mark.parametrize(
    "request_",
    [0, 5, -2, "0", "5", "c9", "", ",", [], [4], [-1], [0, 0], ["a0", 0], [True], True, 1.0, None],
)
def test_device_requests_that_are_refused_quote_the_request_and_what_was_found(
    request_: Any,
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_devices(request_, NAMED, "npu")
    assert str(caught.value).startswith("devices=")
    assert "The 'npu' backend found 4 on this machine." in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 1},
        {"rank": -1},
        {"rank": 2, "size": 2},
        {"local_rank": 1},
        {"local_rank": -1},
        {"size": 2, "local_size": 3, "address": "a", "port": 1},
        {"size": 2},
        {"size": 2, "address": "a"},
        {"size": 2, "port": 1},
    ],
    ids=str,
)
def test_an_impossible_world_cannot_be_built(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"world|local rank"):
        World(**fields)


def test_only_rank_0_is_main() -> None:
    assert World().is_main
    assert not World(rank=1, size=2, local_rank=1, local_size=2, address="a", port=1).is_main


VALUES = [
    BackendEntry("npu", "drivetrain-npu 1.0", probe=Probe(2)),
    Capabilities(frozenset({Feature.CLOSURE}), frozenset({"32-true"})),
    Clip(1.0),
    ContractVersion(1, 2),
    DeviceFacts("npu", "gloo", "cpu"),
    Inventory(strategies=(StrategyEntry("zero", "drivetrain-zero 1.0"),)),
    LaunchPlan("script", (World(),), ("python",), (("A", "1"),)),
    LaunchRequest(2),
    ModelState({}),
    PrecisionPolicy(),
    Probe(1, "", ("a",)),
    StepHooks(),
    StepResult(loss=None, applied=True),  # type: ignore[arg-type]
    World(rank=1, size=2, local_rank=1, local_size=2, address="host", port=1),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_frozen_and_survive_pickling(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
