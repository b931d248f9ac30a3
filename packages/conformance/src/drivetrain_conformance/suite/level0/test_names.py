"""Precisions, strategies and launchers by name: what is declared is made, the rest is refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from drivetrain_interfaces import (
    Accelerator,
    Backend,
    CheckpointIO,
    Collectives,
    DeviceFacts,
    Launcher,
    Precision,
    PrecisionPolicy,
    StrategyContext,
    UnsupportedError,
    World,
)

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.messages import KNOWN_PRECISIONS, refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import BackendSpec

    from drivetrain_conformance.target import Target


def test_the_backend_has_all_factories(backend: Backend) -> None:
    """A method that is missing would show up deep inside a run.

    R: B11
    """
    assert isinstance(backend, Backend), (
        f"B11: load() returns a Backend, with all of its factories; {type(backend).__name__} "
        "lacks some"
    )


def test_every_declared_precision_can_be_made(
    backend: Backend, target: Target, declared_precision: str
) -> None:
    """What is declared works.

    R: B4, P2
    """
    assert target.declares(declared_precision), "B4: at least one precision is declared"
    precision = backend.precision(declared_precision)
    assert isinstance(precision, Precision), (
        f"B4: a declared precision can be made; {declared_precision!r} gave a "
        f"{type(precision).__name__}, which lacks members of Precision"
    )
    assert precision.name == declared_precision, (
        f"P2: a precision has the name it was asked by; {declared_precision!r} gave one called "
        f"{precision.name!r}"
    )
    assert isinstance(precision.policy, PrecisionPolicy), (
        f"P2: a precision states its policy as data; {declared_precision!r} has "
        f"{precision.policy!r}"
    )


@pytest.mark.parametrize(
    "name",
    [
        "no-such-precision",
        *(pytest.param(n, marks=pytest.mark.refuses(n)) for n in KNOWN_PRECISIONS),
    ],
)
def test_an_undeclared_precision_is_refused(backend: Backend, spec: BackendSpec, name: str) -> None:
    """What is not declared is refused by name, and never turned into something else.

    R: B4, B14, P1, P9
    """
    if name in spec.capabilities.precisions:
        pytest.skip(f"{BY_DECLARATION}the backend declares {name}, and its strategy does not")
    rule = f"B14: precision {name!r}, which is not declared, is refused with an UnsupportedError"
    with refused(UnsupportedError, naming=re.escape(name), rule=rule) as caught:
        backend.precision(name)
    for declared in spec.capabilities.precisions:
        assert declared in str(caught.value), (
            f"P1: the refusal of a precision lists those that are declared; {declared!r} is not "
            f"in: {caught.value}"
        )


def test_an_undeclared_strategy_is_refused(backend: Backend, spec: BackendSpec) -> None:
    """A misspelt strategy must not become the default one.

    R: B4, B14
    """
    context = StrategyContext(
        accelerator=backend.accelerator(),
        device_index=0,
        world=World(),
        collectives=backend.collectives(World()),
        precision=backend.precision(min(spec.capabilities.precisions)),
    )
    rule = "B14: a strategy that is not declared is refused with an UnsupportedError"
    with refused(UnsupportedError, naming="no-such-strategy", rule=rule) as caught:
        backend.strategy("no-such-strategy", context)
    for declared in spec.strategies:
        assert declared in str(caught.value), (
            f"B14: the refusal of a strategy lists those that are declared; {declared!r} is not "
            f"in: {caught.value}"
        )


def test_factories_keep_nothing(backend: Backend, spec: BackendSpec) -> None:
    """Two parts of one kind share no state.

    R: B13
    """
    name = min(spec.capabilities.precisions)
    factories: dict[str, Callable[[], object]] = {
        "accelerator": backend.accelerator,
        "checkpoint_io": backend.checkpoint_io,
        "precision": lambda: backend.precision(name),
    }
    for what, make in factories.items():
        one, other = make(), make()
        assert one is not other, f"B13: each call of {what} returns a new object"


def test_the_parts_are_complete(backend: Backend, spec: BackendSpec) -> None:
    """Every part has all members of its contract.

    R: B11, B15, B16, A1, A2
    """
    accelerator = backend.accelerator()
    parts = {
        Accelerator: accelerator,
        CheckpointIO: backend.checkpoint_io(),
        Collectives: backend.collectives(World()),
    }
    for contract, part in parts.items():
        assert isinstance(part, contract), (
            f"B11: a backend's {contract.__name__} has all members of that contract; "
            f"{type(part).__name__} lacks some"
        )
    assert isinstance(accelerator.facts, DeviceFacts), "A1: an accelerator has facts"
    assert accelerator.facts == spec.facts, (
        f"A1: the facts of the accelerator are those of the spec, so that plan and run cannot "
        f"disagree; {accelerator.facts} and {spec.facts}"
    )
    assert accelerator.device_type == spec.facts.device_type, (
        f"A2: device_type equals facts.device_type; {accelerator.device_type!r} and "
        f"{spec.facts.device_type!r}"
    )
    facts = spec.facts
    for name in {
        facts.several_devices_launcher,
        facts.interactive_launcher,
        getattr(facts, "process_launcher", ""),
    }:
        launcher = backend.launcher(name)
        assert launcher is None or isinstance(launcher, Launcher), (
            f"B16: launcher({name!r}) returns None, to use the shared one, or a Launcher; it "
            f"returned a {type(launcher).__name__}"
        )


def test_a_launcher_that_nobody_has_is_not_made_up(backend: Backend) -> None:
    """None stands for the shared launcher of that name.

    R: B16
    """
    assert backend.launcher("no-such-launcher") is None, (
        "B16: launcher(name) returns None for every name that the backend does not bring itself"
    )
