"""Moving batches; rules S7 and S8 of docs/contracts/strategy.md."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from drivetrain_toolkit.trees import move

CPU = torch.device("cpu")
META = torch.device("meta")


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    label: str = "kept"


@dataclass
class Derived:
    x: torch.Tensor
    doubled: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.doubled = self.x * 2


class Mover:
    def __init__(self):
        self.device = None

    def to(self, device):
        moved = Mover()
        moved.device = device
        return moved


class InPlaceMover(Mover):
    def to(self, device):
        self.device = device


def one():
    return torch.ones(2)


@pytest.mark.parametrize(
    "batch",
    [
        one(),
        (one(), one()),
        [one(), one()],
        {"x": one(), "y": [one(), 3, "text", None]},
        Pair(one(), (one(), {"z": one()})),
        Frozen(one()),
        OrderedDict(a=one()),
        5,
        "text",
        None,
        object(),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_that_is_in_place_is_returned_itself(batch):
    """S7"""
    assert move(batch, CPU) is batch


def test_tensors_are_found_in_nested_containers_of_every_kind():
    """S8"""
    batch = {"a": [one(), (one(), Pair(one(), "text"))], "b": Frozen(one()), "c": 3}
    moved = move(batch, META)
    assert moved["a"][0].device == META
    assert moved["a"][1][0].device == META
    assert moved["a"][1][1].left.device == META
    assert moved["a"][1][1].right == "text"
    assert type(moved["a"][1][1]) is Pair
    assert moved["b"].x.device == META
    assert moved["b"].label == "kept"
    assert moved["c"] == 3


def test_the_callers_batch_is_not_changed():
    """S8"""
    batch = {"a": [one()], "b": Frozen(one()), "c": Derived(one())}
    move(batch, META)
    assert batch["a"][0].device == CPU
    assert batch["b"].x.device == CPU
    assert batch["c"].doubled.device == CPU


def test_the_class_of_a_mapping_is_kept_with_what_it_knows():
    """S8"""
    default = defaultdict(list, x=one())
    moved = move(default, META)
    assert type(moved) is defaultdict
    assert moved["missing"] == []
    assert list(move(OrderedDict(b=one(), a=one()), META)) == ["b", "a"]
    assert type(move(UserDict(x=one()), META)) is UserDict
    assert move(MappingProxyType({"x": one()}), META)["x"].device == META


def test_the_class_of_a_sequence_is_kept():
    """S8"""

    class Rows(list):
        note = "mine"

    moved = move(Rows([one()]), META)
    assert type(moved) is Rows
    assert moved[0].device == META
    maximum = torch.max(torch.eye(2), dim=0)  # a named tuple made by torch
    assert move(maximum, META).indices.device == META


def test_fields_that_a_dataclass_computes_move_too():
    """S8"""
    moved = move(Derived(one()), META)
    assert moved.x.device == META
    assert moved.doubled.device == META


def test_objects_that_can_move_themselves_do():
    """S8"""
    assert move(Mover(), META).device == META
    itself = InPlaceMover()
    assert move(itself, META) is itself
    assert itself.device == META
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert type(move([packed], CPU)[0]) is type(packed)


def test_a_class_in_a_batch_is_left_alone():
    """S8"""
    assert move([torch.Tensor, one()], META)[0] is torch.Tensor
