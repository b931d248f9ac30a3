"""State by parameter name; rules S28 to S32 of docs/contracts/strategy.md."""

from __future__ import annotations

import copy

import pytest
import torch
from drivetrain_interfaces import CheckpointError
from torch import nn

from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizer,
    restore_optimizers,
)

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def train(module, optimizer, steps=2):
    def closure():
        optimizer.zero_grad()
        loss = module(X).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def two_groups(module):
    return torch.optim.AdamW(
        [
            {"params": module[0].parameters(), "lr": 0.1, "note": "mine"},
            {"params": [*module[1].parameters(), *module[2].parameters()], "lr": 0.01},
        ]
    )


OPTIMIZERS = {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "SGD without state": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "fused": lambda m: torch.optim.Adam(m.parameters(), fused=True),
    "groups": two_groups,
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3),
    "named": lambda m: torch.optim.Adam(m.named_parameters()),
    "tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_bitwise(name):
    """S28, S30, S31"""
    make = OPTIMIZERS[name]
    module = net()
    optimizer = make(module)
    train(module, optimizer)
    weights, state = gather_module(module), gather_optimizer(optimizer, module)
    other = net(seed=1)
    again = make(other)
    restore_module(other, weights)
    restore_optimizer(again, other, state)
    train(module, optimizer)
    train(other, again)
    for mine, theirs in zip(other.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_optimizer_state_is_keyed_by_name_and_groups_keep_their_extras():
    """S30: scalar tensors stay tensors."""
    module = net()
    optimizer = two_groups(module)
    train(module, optimizer)
    state = gather_optimizer(optimizer, module)
    assert set(state["state"]) == {name for name, _ in module.named_parameters()}
    assert torch.equal(state["state"]["0.weight"]["step"], torch.tensor(2.0))
    assert state["groups"][0]["parameters"] == ["0.weight", "0.bias"]
    assert state["groups"][0]["note"] == "mine"
    assert [group["lr"] for group in state["groups"]] == [0.1, 0.01]
    assert not any("params" in group for group in state["groups"])


def test_a_state_is_a_copy_in_both_directions():
    """S29: training on changes neither what was gathered nor what was loaded."""
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    weights, state = gather_module(module), gather_optimizer(optimizer, module)
    kept = copy.deepcopy((weights, state))
    restore_module(module, weights)
    restore_optimizer(optimizer, module, state)
    train(module, optimizer)
    assert all(torch.equal(weights[name], value) for name, value in kept[0].items())
    for name, values in kept[1]["state"].items():
        assert all(torch.equal(state["state"][name][key], value) for key, value in values.items())


def test_gathered_tensors_are_contiguous_on_the_host():
    """S29"""
    module = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    assert not module.weight.is_contiguous()
    gathered = gather_module(module)
    assert gathered["weight"].is_contiguous()
    assert gathered["weight"].device.type == "cpu"
    restore_module(module, gathered)
    assert torch.equal(module.weight, gathered["weight"])


def test_parameters_that_were_never_updated_have_no_state():
    """S30"""
    module = net()
    module[2].requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    state = gather_optimizer(optimizer, module)
    assert "2.weight" not in state["state"]
    assert "2.weight" in state["groups"][0]["parameters"]
    fresh = torch.optim.Adam(module.parameters())
    restore_optimizer(fresh, module, state)
    assert module[2].weight not in fresh.state


def test_a_tied_parameter_has_one_state_under_its_first_name():
    """S30: and it is found by any of its names, so that tying may be spelled the other way."""
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    state = gather_optimizer(optimizer, module)
    assert list(state["state"]) == ["0.weight"]
    assert set(gather_module(module)) == {"0.weight", "1.weight"}
    renamed = {
        "state": {"1.weight": state["state"]["0.weight"]},
        "groups": [{**state["groups"][0], "parameters": ["1.weight"]}],
    }
    fresh = torch.optim.Adam(module.parameters())
    restore_optimizer(fresh, module, renamed)
    assert torch.equal(
        fresh.state[module[0].weight]["exp_avg"], state["state"]["0.weight"]["exp_avg"]
    )


def test_order_within_a_group_does_not_matter():
    """S32"""
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    state = gather_optimizer(optimizer, module)
    backwards = torch.optim.Adam(list(module.parameters())[::-1])
    restore_optimizer(backwards, module, state)
    for name, parameter in module.named_parameters():
        assert torch.equal(backwards.state[parameter]["exp_avg"], state["state"][name]["exp_avg"])


def test_extra_state_of_a_module_travels():
    """S28"""

    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    module, other = Counting(2, 2), Counting(2, 2)
    module.seen = 5
    restore_module(other, gather_module(module))
    assert other.seen == 5


def test_missing_and_unknown_names_of_a_module_are_listed():
    """S31"""
    state = gather_module(net())
    del state["0.weight"]
    state["0.extra"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"missing.*0\.weight;.*only: 0\.extra"):
        restore_module(net(), state)
    other = net(seed=1)
    kept = other[0].weight.clone()
    restore_module(other, state, strict=False)
    assert torch.equal(other[0].weight, kept)
    assert torch.equal(other[2].weight, state["2.weight"])


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ_are_listed_before_anything_changes(strict):
    """S31"""
    module = net()
    state = gather_module(net(seed=1))
    state["2.weight"] = torch.ones(1, 7)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        CheckpointError, match=r"2\.weight \(\(1, 7\) in the checkpoint, \(1, 4\) here"
    ):
        restore_module(module, state, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_optimizer_with_other_parameters_is_refused_by_name():
    """S31"""
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer)
    state = gather_optimizer(optimizer, module)
    fewer = torch.optim.Adam(module[0].parameters())
    with pytest.raises(CheckpointError, match=r"Adam.*only: 1\.bias, 1\.weight, 2\.bias"):
        restore_optimizer(fewer, module, state)
    restore_optimizer(fewer, module, state, strict=False)
    assert torch.equal(
        fewer.state[module[0].weight]["exp_avg"], state["state"]["0.weight"]["exp_avg"]
    )
    partial = gather_optimizer(fewer, module)
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: 1\.bias"):
        restore_optimizer(optimizer, module, partial)


def test_groups_that_are_divided_in_another_way_are_refused():
    """S31"""
    module = net()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer)
    state = gather_optimizer(optimizer, module)
    divided = two_groups(module)
    with pytest.raises(CheckpointError, match="2 parameter groups here and 1 in the checkpoint"):
        restore_optimizer(divided, module, state)
    restore_optimizer(divided, module, state, strict=False)
    assert divided.param_groups[1]["lr"] == 0.01
    assert torch.equal(
        divided.state[module[2].bias]["exp_avg"], state["state"]["2.bias"]["exp_avg"]
    )


def test_a_parameter_that_the_module_does_not_have_is_refused():
    """S31"""
    stray = nn.Parameter(torch.ones(2, 5))
    module = net()
    optimizer = torch.optim.SGD([*module.parameters(), stray], lr=0.1)
    with pytest.raises(CheckpointError, match=r"Parameter 6 of group 0 of SGD, of shape \(2, 5\)"):
        gather_optimizer(optimizer, module)


def test_another_number_of_optimizers_is_refused():
    """S31: none on either side means that there is nothing to restore."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    state = gather_optimizer(optimizer, module)
    with pytest.raises(CheckpointError, match="holds 2 optimizers, and this run has 1"):
        restore_optimizers([optimizer], module, [state, state])
    restore_optimizers([], module, [state])
    restore_optimizers([optimizer], module, [])
