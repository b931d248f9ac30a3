"""State: by the user's names, apart from how it was run, and enough to go on bit for bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import CheckpointError, ModelState

from drivetrain_conformance.support.messages import refused
from drivetrain_conformance.support.problems import (
    exact,
    mean_square,
    microbatches,
    perceptron,
)

if TYPE_CHECKING:
    from drivetrain_conformance.fixtures import Build
    from drivetrain_conformance.support.setups import Setup

WINDOWS = [[batch] for batch in microbatches(4)]


def adam(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """An optimizer with tensors and step counts in its state, and two groups."""
    parameters = list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": parameters[:2], "note": "the user's own"},
        {"params": parameters[2:], "lr": 0.02},
    ]
    return [torch.optim.Adam(groups, lr=0.01)]


def trained(build: Build, precision: str | None = None, **settings: Any) -> Setup:
    """A setup after two of the windows."""
    setup = build(precision, optimizers=adam, **settings)
    setup.train(WINDOWS[:2])
    return setup


def leaves(value: Any) -> list[torch.Tensor]:
    """Every tensor in a state."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, ModelState):
        return leaves([value.module, value.optimizers, value.precision])
    if isinstance(value, dict):
        return [t for item in value.values() for t in leaves(item)]
    return [t for item in value for t in leaves(item)] if isinstance(value, (list, tuple)) else []


def test_the_names_are_those_of_the_users_module(build: Build) -> None:
    """Never a wrapper's.

    R: S28, S30
    """
    state = trained(build).strategy.state()
    assert isinstance(state, ModelState), f"S28: state() returns a ModelState, not {state!r}"
    names = list(perceptron().state_dict())
    assert list(state.module) == names, (
        f"S28: names are those of the user's module, {names}; the state has {list(state.module)}"
    )
    (optimizer,) = state.optimizers
    assert set(optimizer["state"]) == set(names), (
        f"S30: optimizer state is keyed by parameter name; it has {sorted(optimizer['state'])}"
    )
    groups = [group["parameters"] for group in optimizer["groups"]]
    assert groups == [names[:2], names[2:]], (
        f"S30: groups list the names of their parameters; they are {groups}"
    )


def test_groups_keep_the_users_keys(build: Build) -> None:
    """And numbers in tensors stay tensors.

    R: S30
    """
    setup = trained(build)
    (optimizer,) = setup.strategy.state().optimizers
    first, second = optimizer["groups"]
    assert first["note"] == "the user's own", "S30: extra keys of groups are kept"
    assert (first["lr"], second["lr"]) == (0.01, 0.02), "S30: hyperparameters are kept by group"
    name = next(iter(optimizer["state"]))
    inner = next(iter(setup.optimizers[0].state.values()))
    kinds = {key: isinstance(value, torch.Tensor) for key, value in inner.items()}
    found = {k: isinstance(v, torch.Tensor) for k, v in optimizer["state"][name].items()}
    assert found == kinds, (
        f"S30: what is a tensor in the optimizer's state stays one; {kinds} became {found}"
    )


def test_a_state_is_on_the_host_and_shares_no_memory(build: Build) -> None:
    """It is written while training goes on.

    R: S29
    """
    setup = trained(build)
    state = setup.strategy.state()
    kept = [tensor.clone() for tensor in leaves(state)]
    assert kept, "S29: a state holds tensors"
    for tensor in leaves(state):
        assert tensor.device.type == "cpu", f"S29: tensors are on the host, not {tensor.device}"
        assert tensor.is_contiguous(), "S29: tensors of a state are contiguous"
        assert not tensor.requires_grad, "S29: tensors of a state need no gradient"
    setup.train(WINDOWS[2:])
    assert all(torch.equal(a, b) for a, b in zip(kept, leaves(state), strict=True)), (
        "S29: a state shares no memory with what it came from; training on changed it"
    )


def test_a_state_that_was_loaded_is_not_changed(build: Build) -> None:
    """Whoever loaded it may load it again.

    R: S29
    """
    state = trained(build).strategy.state()
    kept = [tensor.clone() for tensor in leaves(state)]
    other = build(optimizers=adam)
    other.strategy.load(state)
    other.train(WINDOWS[2:])
    assert all(torch.equal(a, b) for a, b in zip(kept, leaves(state), strict=True)), (
        "S29: a state shares no memory with what it goes to; training on changed it"
    )


def test_a_state_is_enough_to_go_on(build: Build, declared_precision: str) -> None:
    """Two updates, and two more after a round trip, are the same four updates.

    R: S28, P13
    """
    whole = trained(build, declared_precision)
    state = copy.deepcopy(whole.strategy.state())
    whole.train(WINDOWS[2:])
    resumed = build(declared_precision, optimizers=adam)
    resumed.strategy.load(state)
    resumed.train(WINDOWS[2:])
    for name, value in whole.parameters().items():
        assert torch.equal(resumed.parameters()[name], value), (
            f"S28: what state returns and load takes is enough to go on bit for bit; {name!r} "
            f"differs in {declared_precision}"
        )


def test_buffers_are_part_of_the_state(build: Build) -> None:
    """Running statistics are not recomputed.

    R: S28
    """

    def loss(module: torch.nn.Module, item: Any) -> torch.Tensor:
        value: torch.Tensor = module(item[0]).square().mean() + 1.0
        return value

    def norm() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))

    setup = build(module=norm(), loss=loss)
    setup.train(WINDOWS[:2])
    state = setup.strategy.state()
    assert int(state.module["0.num_batches_tracked"]) == 2, (  # noqa: PLR2004 - two updates
        "S28: buffers are part of the state, and they are those of after training"
    )
    other = build(module=norm(), loss=loss)
    other.strategy.load(state)
    for name, value in other.strategy.state().module.items():
        assert torch.equal(value, state.module[name]), f"S28: {name!r} comes back as it was"


class Transposed(torch.nn.Module):
    """A linear layer whose weight lies in memory the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(exact((2, 3), 1).t())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """One product."""
        return features @ self.weight


def test_a_state_is_contiguous_whatever_the_module_is(build: Build) -> None:
    """So that it can be written as it is; and it loads into such a module again.

    R: S29
    """
    setup = build(module=Transposed(), optimizers=lambda m: [torch.optim.Adam(m.parameters())])
    setup.train(WINDOWS[:1])
    state = setup.strategy.state()
    assert all(tensor.is_contiguous() for tensor in leaves(state)), (
        "S29: tensors of a state are contiguous, also where the module's are not"
    )
    other = build(module=Transposed(), optimizers=lambda m: [torch.optim.Adam(m.parameters())])
    other.strategy.load(state)
    assert torch.equal(other.parameters()["weight"], setup.parameters()["weight"]), (
        "S28: such a state comes back as it was"
    )


class Tied(torch.nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3, bias=False)
        self.outer = torch.nn.Linear(3, 3, bias=False)
        self.outer.weight = self.inner.weight
        self.head = torch.nn.Linear(3, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Through the tied weights twice."""
        result: torch.Tensor = self.head(self.outer(self.inner(features).tanh()))
        return result


def test_a_tied_parameter_stays_tied(build: Build) -> None:
    """It is trained once, has both names in the module's state, and the first in the optimizer's.

    R: S30, P4
    """

    def optimizers(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(module.parameters(), lr=0.01)]

    setup = build(module=Tied(), optimizers=optimizers)
    setup.train(WINDOWS[:2])
    state = setup.strategy.state()
    assert {"inner.weight", "outer.weight"} <= set(state.module), (
        "S28: a tied parameter has all the names that it has in the user's state_dict"
    )
    assert torch.equal(state.module["inner.weight"], state.module["outer.weight"]), (
        "S30: a tied parameter stays tied while it is trained"
    )
    names = set(state.optimizers[0]["state"])
    assert names == {"inner.weight", "head.weight", "head.bias"}, (
        f"S30: a tied parameter is keyed by its first name; the optimizer has {sorted(names)}"
    )
    other = build(module=Tied(), optimizers=optimizers)
    other.strategy.load(state)
    other.train(WINDOWS[2:3])
    kept = [name for name, _ in other.module.named_parameters()]
    assert "outer.weight" not in kept, "S30: a tied parameter stays tied after load"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda m: m.pop("2.bias"), "2.bias"),
        (lambda m: m.update(stranger=torch.ones(1)), "stranger"),
        (lambda m: m.update({"0.weight": torch.ones(7, 3)}), "0.weight"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_state_that_does_not_fit_is_refused(build: Build, change: Any, names: str) -> None:
    """By name.

    R: S31
    """
    state = trained(build).strategy.state()
    tensors = dict(state.module)
    change(tensors)
    setup = build(optimizers=adam)
    rule = f"S31: load raises CheckpointError for what does not fit, and names {names!r}"
    with refused(CheckpointError, naming=names.replace(".", r"\."), rule=rule):
        setup.strategy.load(replace(state, module=tensors))


def test_what_fits_is_restored_if_that_is_asked(build: Build) -> None:
    """With strict=False, the rest is left; shapes must be equal even so.

    R: S31
    """
    state = trained(build).strategy.state()
    tensors = dict(state.module)
    del tensors["2.bias"]
    tensors["stranger"] = torch.ones(1)
    setup = build(optimizers=adam)
    setup.strategy.load(ModelState(module=tensors), strict=False)
    now = setup.parameters()
    assert torch.equal(now["0.weight"], state.module["0.weight"].to(now["0.weight"].dtype)), (
        "S31: with strict=False, what has the same name is restored"
    )
    assert torch.equal(now["2.bias"], setup.start["2.bias"]), "S31: and the rest is left"
    tensors["0.weight"] = torch.ones(7, 3)
    rule = "S31: shapes must be equal also with strict=False"
    with refused(CheckpointError, naming=r"0\.weight", rule=rule):
        setup.strategy.load(ModelState(module=tensors), strict=False)


def test_a_state_without_optimizers_loads_weights_alone(build: Build) -> None:
    """For fine-tuning and for evaluation.

    R: S31
    """
    state = trained(build).strategy.state()
    setup = build(optimizers=adam)
    setup.strategy.load(ModelState(module=state.module))
    now = setup.parameters()
    assert all(torch.equal(now[name], state.module[name]) for name in now), (
        "S31: a state without optimizers loads weights"
    )
    assert not setup.optimizers[0].state, "S31: and leaves the optimizers alone"
    setup.train(WINDOWS[2:3])


def test_the_optimizer_of_another_module_is_refused(build: Build) -> None:
    """Its moments belong to other parameters.

    R: S31
    """
    state = trained(build).strategy.state()
    (optimizer,) = state.optimizers
    renamed = {f"other.{name}": value for name, value in optimizer["state"].items()}
    groups = [
        {**group, "parameters": [f"other.{name}" for name in group["parameters"]]}
        for group in optimizer["groups"]
    ]
    setup = build(optimizers=adam)
    strange = replace(state, optimizers=[{"state": renamed, "groups": groups}])
    rule = "S31: load raises CheckpointError for an optimizer state of other parameters"
    with refused(CheckpointError, naming=r"other\.0\.weight", rule=rule):
        setup.strategy.load(strange)


def test_a_module_alone_can_be_loaded_for_evaluation(build: Build) -> None:
    """Before any train step was built.

    R: S31
    """
    state = trained(build).strategy.state()
    setup = build()
    item = microbatches(1)[0]
    setup.strategy.load(replace(state, optimizers=()))
    reference = perceptron()
    reference.load_state_dict({k: v.float() for k, v in state.module.items()})
    with torch.no_grad():
        wanted = float(mean_square(reference, item))
        found = float(mean_square(setup.module, setup.strategy.feed(item)))
    assert found == pytest.approx(wanted, rel=max(setup.tolerance.loss, 1e-5)), (
        "S31: what was loaded is what is evaluated"
    )
