"""Averaging gradients for manual steps; rule S26 of docs/contracts/strategy.md."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import ReduceOp
from torch import nn

from drivetrain_toolkit import averaging
from drivetrain_toolkit.averaging import average_gradients


class Other:
    """Collectives with one other rank, whose gradients are all ones where it has any."""

    def __init__(self, present):
        self.present = torch.tensor(present, dtype=torch.uint8)
        self.sizes = []

    def all_reduce(self, tensor, op):
        if op is ReduceOp.MAX:
            return torch.maximum(tensor, self.present)
        assert op is ReduceOp.MEAN
        self.sizes.append(tensor.numel())
        return (tensor + 1) / 2


def parameters(*shapes, dtype=torch.float32):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def test_a_gradient_that_only_the_other_rank_has_counts_as_zero_here():
    """S26"""
    made = parameters(2, 3, 4)
    made[0].grad = torch.full((2,), 3.0)
    average_gradients(made, Other([1, 1, 0]))
    assert made[0].grad.tolist() == [2.0, 2.0]
    assert made[1].grad.tolist() == [0.5] * 3
    assert made[2].grad is None


def test_sparse_gradients_are_averaged_as_dense_ones():
    """S26: ranks hold different rows."""
    table = nn.Embedding(3, 2, sparse=True)
    (table(torch.tensor([1, 1])) * 3).sum().backward()
    average_gradients([table.weight], Other([1]))
    assert table.weight.grad.tolist() == [[0.5, 0.5], [3.5, 3.5], [0.5, 0.5]]


def test_dtypes_travel_apart_and_layouts_survive():
    """S26"""
    made = [*parameters(2), *parameters((2, 3), dtype=torch.float64)]
    made[0].grad = torch.ones(2)
    made[1].grad = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).t()
    other = Other([1, 1])
    average_gradients(made, other)
    assert other.sizes == [2, 6]
    assert made[1].grad.tolist() == [[0.5, 1.5, 2.5], [1.0, 2.0, 3.0]]


@pytest.mark.parametrize(("limit", "sizes"), [(1, [2, 3, 4]), (20, [5, 4]), (10**6, [9])])
def test_a_bucket_holds_at_most_so_many_bytes(monkeypatch, limit, sizes):
    """S26"""
    monkeypatch.setattr(averaging, "BUCKET_BYTES", limit)
    made = parameters(2, 3, 4)
    for parameter in made:
        parameter.grad = torch.full_like(parameter, 3.0)
    other = Other([1, 1, 1])
    average_gradients(made, other)
    assert other.sizes == sizes
    assert all((parameter.grad == 2).all() for parameter in made)


def test_nothing_to_average_is_no_communication():
    """S26"""
    other = Other([0])
    average_gradients([], other)
    average_gradients(parameters(2), other)
    assert other.sizes == []
