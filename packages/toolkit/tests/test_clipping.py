"""Clipping against torch's own; rules S20 to S22 of docs/contracts/strategy.md."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import Clip, ConfigurationError, UnsupportedError
from torch import nn

from drivetrain_toolkit.clipping import (
    check_clip,
    clip_by_norm,
    clip_by_value,
    gradients,
    scale,
    total_norm,
)


def parameters(*, grad_scale=1.0):
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (4,), ())]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * grad_scale
    return made


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clipping_by_norm_is_torchs_and_tells_the_norm_before(limit):
    """S20"""
    mine, theirs = parameters(), parameters()
    norm = clip_by_norm([p.grad for p in mine], limit)
    expected = nn.utils.clip_grad_norm_(theirs, limit)
    assert torch.equal(norm, expected)
    assert norm.shape == ()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
    after = total_norm([p.grad for p in mine])
    assert after <= limit * (1 + 1e-5)


def test_clipping_by_value_is_torchs():
    """S21"""
    mine, theirs = parameters(), parameters()
    clip_by_value([p.grad for p in mine], 0.3)
    nn.utils.clip_grad_value_(theirs, 0.3)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_norm_over_several_dtypes_is_one_norm():
    """S20"""
    grads = [torch.full((2,), 3.0), torch.full((2,), 4.0, dtype=torch.float64)]
    assert total_norm(grads).item() == pytest.approx(50**0.5)


def test_no_gradients_have_norm_zero():
    """S20"""
    assert clip_by_norm([], 1.0).item() == 0
    clip_by_value([], 1.0)
    scale([], 2.0)


def test_a_sparse_gradient_counts_each_element_once():
    """S20: an index that occurs twice holds the sum of its parts."""
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    grad = table.weight.grad
    dense = grad.to_dense()
    norm = clip_by_norm([grad], 1.0)
    assert norm.item() == pytest.approx(dense.norm().item())
    torch.testing.assert_close(grad.to_dense(), dense / dense.norm())


def test_gradients_that_two_optimizers_share_count_once():
    """S20"""
    made = parameters()
    first = torch.optim.SGD(made[:2], lr=0.1)
    second = torch.optim.SGD(made[1:], lr=0.1)
    assert [id(g) for g in gradients([first, second])] == [id(p.grad) for p in made]
    made[1].grad = None
    assert len(gradients([first])) == 1


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_scaling_multiplies_in_place(factor):
    """S18"""
    made = parameters()
    kept = [p.grad.clone() for p in made]
    scale([p.grad for p in made], factor)
    assert all(torch.equal(p.grad, old * 0.5) for p, old in zip(made, kept, strict=True))


def test_unknown_ways_of_clipping_are_refused():
    """S22"""
    check_clip(None)
    check_clip(Clip(1.0, by="value"))
    with pytest.raises(UnsupportedError, match="'median'"):
        check_clip(Clip(1.0, by="median"))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_no_positive_number_is_refused(value):
    """S22"""
    with pytest.raises(ConfigurationError, match="positive"):
        check_clip(Clip(value))
