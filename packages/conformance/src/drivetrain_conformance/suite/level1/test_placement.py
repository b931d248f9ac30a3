"""Where modules and batches go, and what stays as the user made it."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from drivetrain_interfaces import ConfigurationError, Strategy, UnsupportedError

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import microbatches, parameters_of, perceptron, sgd

if TYPE_CHECKING:
    from drivetrain_interfaces import BackendSpec

    from drivetrain_conformance.fixtures import Bind, Build
    from drivetrain_conformance.target import Target


def test_a_bound_strategy_is_complete(bind: Bind, spec: BackendSpec) -> None:
    """It knows its device at once.

    R: S1, S6
    """
    strategy = bind()
    assert isinstance(strategy, Strategy), (
        f"S1: a bound strategy has all members of Strategy; {type(strategy).__name__} lacks some"
    )
    assert strategy.device.type == spec.facts.device_type, (
        f"S6: device is known as soon as the strategy is bound; it is {strategy.device!r}"
    )


def bound_or_refused(bind: Bind, name: str) -> Strategy | None:
    """The strategy of that name in a world of one, or None if it needs more."""
    try:
        return bind(name=name)
    except UnsupportedError:
        return None


def test_every_strategy_serves_one_process_or_refuses(bind: Bind, target: Target) -> None:
    """So that a script for many also runs alone.

    R: S3, S9
    """
    from drivetrain_interfaces import StepSpec

    from drivetrain_conformance.support.problems import mean_square

    for name in (*target.spec.strategies, target.one_device_strategy):
        strategy = bound_or_refused(bind, name)
        if strategy is None:
            assert name != target.one_device_strategy, (
                f"S3: the strategy for one device serves a world of one; {name!r} refused it"
            )
            continue
        module = strategy.prepare(perceptron())
        before = parameters_of(module)
        with strategy.train_step(StepSpec(module, [sgd(module)], mean_square)) as step:
            step([strategy.feed(microbatches(1)[0])])
        after = parameters_of(module)
        assert any(not after[key].equal(value) for key, value in before.items()), (
            f"S9: a step of the strategy {name!r} updates parameters"
        )
        strategy.close()


def test_options_that_a_strategy_does_not_take_are_refused(bind: Bind) -> None:
    """A misspelt option must not be ignored.

    R: S2
    """
    kinds = (ConfigurationError, UnsupportedError)
    rule = "S2: options that the strategy does not take are refused"
    with refused(kinds, naming="no_such_option", rule=rule):
        bind(options={"no_such_option": 1})


def test_each_binding_is_a_new_object(bind: Bind) -> None:
    """Two parts of one kind share no state.

    R: B13
    """
    one, other = bind(), bind()
    assert one is not other, "B13: each binding is a new object"


def test_a_strategy_package_gives_a_factory(bind: Bind, target: Target) -> None:
    """An object that is bound by a call, and that reaches other processes.

    R: S1, B18
    """
    spec = target.strategy_spec
    if spec is None:
        pytest.skip(f"{BY_DECLARATION}the strategy is the backend's own")
    factory = spec.load()
    assert callable(factory), f"S1: what load returns is called with a context; it is {factory!r}"
    pickle.dumps(factory)
    assert isinstance(bind(), Strategy), "S1: calling it with a context binds it"


def test_preparing_moves_and_converts(build: Build, declared_precision: str) -> None:
    """Parameters are on the device, in the format that the policy states.

    R: S4, P2, P4
    """
    setup = build(declared_precision)
    stored = setup.precision.policy.parameters
    for name, parameter in setup.module.named_parameters():
        assert parameter.device.type == setup.strategy.device.type, (
            f"S4: prepare moves parameters to {setup.strategy.device}; {name!r} is on "
            f"{parameter.device}"
        )
        assert str(parameter.dtype) == f"torch.{stored}", (
            f"S4: prepare converts to the precision, whose policy stores {stored}; {name!r} is "
            f"{parameter.dtype}"
        )


def test_preparing_keeps_the_values(build: Build, declared_precision: str) -> None:
    """Every format holds the values of this module exactly.

    R: S4
    """
    setup = build(declared_precision)
    for name, value in parameters_of(perceptron()).items():
        assert torch.equal(setup.start[name].double(), value.double()), (
            f"S4: prepare keeps the values of parameters; {name!r} changed in {declared_precision}"
        )


def test_buffers_move_too(bind: Bind) -> None:
    """Also integer ones, which stay integers.

    R: S4, P4
    """
    strategy = bind()
    module = strategy.prepare(torch.nn.BatchNorm1d(2))
    for name, buffer in module.named_buffers():
        assert buffer.device.type == strategy.device.type, f"S4: prepare moves the buffer {name!r}"
    assert module.num_batches_tracked.dtype is torch.int64, "P4: integers are never cast"


class Pair(NamedTuple):
    """A batch as a named tuple."""

    features: Any
    targets: Any


@dataclass
class Example:
    """A batch as a dataclass."""

    features: Any
    name: str


@dataclass(frozen=True)
class Frozen:
    """A batch as a dataclass that cannot be changed."""

    features: Any


class Bag:
    """A batch of the user's own class, with ``to``."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def to(self, device: torch.device, *_: Any, **__: Any) -> Bag:
        """This bag on another device."""
        return Bag(self.value.to(device))


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a batch of the kinds above."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    if isinstance(value, (Example, Frozen)):
        return tensors(value.features)
    return [value.value] if isinstance(value, Bag) else []


def a_batch() -> dict[str, Any]:
    """Every kind of container, and things that are no tensors."""
    one = torch.ones(2)
    return {
        "list": [one, 1],
        "tuple": (one, "text"),
        "named": Pair(one, None),
        "ordered": OrderedDict(a=one),
        "dataclass": Example(one, "x"),
        "frozen": Frozen([one]),
        "default": defaultdict(list, a=[one]),
        "own": Bag(one),
        "integers": torch.arange(3),
        "plain": 2.5,
    }


def test_feeding_moves_every_tensor(bind: Bind) -> None:
    """Inside lists, tuples, named tuples, mappings, dataclasses, and what has ``to``.

    R: S8
    """
    strategy = bind()
    batch = a_batch()
    fed = strategy.feed(batch)
    for key, value in fed.items():
        assert type(value) is type(batch[key]), (
            f"S8: containers keep their class; {type(batch[key]).__name__} became "
            f"{type(value).__name__}"
        )
        for tensor in tensors(value):
            assert tensor.device.type == strategy.device.type, (
                f"S8: feed moves tensors inside {key!r} to {strategy.device}; one is on "
                f"{tensor.device}"
            )
    assert fed["plain"] == batch["plain"], "S8: what is no tensor stays"
    assert fed["tuple"][1] == "text", "S8: what is no tensor stays"
    assert fed["integers"].dtype is torch.int64, "S8: feed moves and does not convert"


def test_feeding_leaves_the_callers_batch(bind: Bind) -> None:
    """Loaders hand the same objects out again.

    R: S8
    """
    strategy = bind()
    batch = a_batch()
    before = [t.device for value in batch.values() for t in tensors(value)]
    strategy.feed(batch)
    after = [t.device for value in batch.values() for t in tensors(value)]
    assert before == after, "S8: the caller's batch is left as it was"
    assert list(batch) == list(a_batch()), "S8: the caller's batch is left as it was"


def test_feeding_what_is_there_costs_nothing(bind: Bind) -> None:
    """The same object comes back.

    R: S7
    """
    strategy = bind()
    fed = strategy.feed(microbatches(1)[0])
    assert strategy.feed(fed) is fed, (
        "S7: feed returns the same object if all of it is on the device"
    )


def test_closing_a_strategy_twice_is_harmless(build: Build) -> None:
    """Whoever cleans up need not know who did before.

    R: S35
    """
    setup = build()
    setup.train([microbatches(1)])
    setup.strategy.close()
    setup.strategy.close()
    assert parameters_of(setup.module), "S35: the module outlives its strategy"
