"""Numeric formats; rules P1 to P16 of docs/contracts/precision.md."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from drivetrain_interfaces import (
    CheckpointError,
    Precision,
    PrecisionPolicy,
    UnsupportedError,
    UserCodeError,
)
from torch import nn

from drivetrain_toolkit import specs
from drivetrain_toolkit.precision import (
    AutocastPrecision,
    FullPrecision,
    ScaledAutocastPrecision,
    TruePrecision,
    make_precision,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def backward(precision, module, x):
    with precision.forward():
        loss = module(x).float().square().mean()
    precision.backward(loss)
    return loss


def snapshot(module, optimizers):
    return copy.deepcopy([module.state_dict(), *(item.state_dict() for item in optimizers)])


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", sorted(specs.PRECISIONS))
def test_every_declared_precision_is_made_and_has_its_name(name):
    """P1"""
    precision = make_precision(name, "cpu")
    assert isinstance(precision, Precision)
    assert precision.name == name


def test_an_unknown_precision_is_refused_with_those_that_exist():
    """P1"""
    with pytest.raises(UnsupportedError, match=r"'fp8'.*16-mixed, 16-true, 32-true, 64-true"):
        make_precision("fp8", "cpu")


@pytest.mark.parametrize(
    ("name", "parameters", "compute", "scaling"),
    [
        ("32-true", "float32", "float32", False),
        ("16-true", "float16", "float16", False),
        ("bf16-true", "bfloat16", "bfloat16", False),
        ("64-true", "float64", "float64", False),
        ("bf16-mixed", "float32", "bfloat16", False),
        ("16-mixed", "float32", "float16", True),
    ],
)
def test_the_policy_says_what_the_precision_does(name, parameters, compute, scaling):
    """P2: what an engine that applies it itself would read."""
    precision = make_precision(name, "cpu")
    policy = precision.policy
    assert (policy.parameters, policy.compute) == (parameters, compute)
    assert policy.loss_scaling is scaling
    assert policy.reduce == parameters
    module = precision.convert(net())
    assert {p.dtype for p in module.parameters()} == {getattr(torch, parameters)}


def test_full_precision_leaves_a_module_as_it_was_built():
    """P3"""
    module = net().double()
    assert FullPrecision().convert(module) is module
    assert module[0].weight.dtype is torch.float64
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_an_own_precision_needs_to_override_only_what_differs():
    """P3"""

    class Halved(FullPrecision):
        name = "halved"
        policy = PrecisionPolicy()

        def backward(self, loss):
            super().backward(loss / 2)

    weight = nn.Parameter(torch.ones(()))
    precision = Halved()
    assert isinstance(precision, Precision)
    precision.backward(weight * 3)
    assert weight.grad.item() == 1.5
    calls = []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert precision.step([optimizer], lambda: calls.append(weight.item()))
    assert calls == [1.0]
    assert weight.item() == -0.5


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_features_are_cast_where_they_meet_parameters(name, dtype):
    """P4: also by keyword and in the hidden state of a recurrent module; integers never."""
    module = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 3),
            "linear": nn.Linear(3, 3),
            "recurrent": nn.GRU(3, 3, batch_first=True),
            "norm": nn.BatchNorm1d(3),
        }
    )
    make_precision(name, "cpu").convert(module)
    assert module["embed"](torch.tensor([1, 2])).dtype is dtype
    assert module["linear"](input=torch.ones(2, 3)).dtype is dtype
    out, hidden = module["recurrent"](torch.ones(2, 4, 3), torch.zeros(1, 2, 3))
    assert out.dtype is hidden.dtype is dtype
    assert module["norm"].running_mean.dtype is dtype
    assert module["norm"].num_batches_tracked.dtype is torch.int64


def test_targets_and_complex_parameters_are_not_touched():
    """P4"""
    module = nn.Linear(2, 1)
    module.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    TruePrecision("64-true").convert(module)
    assert module.phase.dtype is torch.complex64
    target = torch.ones(2, 1)
    loss = nn.functional.mse_loss(module(torch.ones(2, 2)), target.double())
    assert loss.dtype is torch.float64
    assert target.dtype is torch.float32


def test_converting_keeps_parameters_that_optimizers_and_ties_know():
    """P4"""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    before = list(module.parameters())
    TruePrecision("bf16-true").convert(module)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert module[1].weight is module[0].weight


def test_converting_twice_is_converting_once_and_another_format_wins():
    """P5"""
    module = nn.Linear(2, 2)
    for name in ("bf16-true", "bf16-true", "64-true"):
        TruePrecision(name).convert(module)
    assert len(module._forward_pre_hooks) == 1
    assert module(torch.ones(1, 2)).dtype is torch.float64


def test_a_converted_module_pickles_and_copies():
    """P5"""
    module = TruePrecision("64-true").convert(nn.Linear(2, 2))
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(torch.ones(1, 2)), module(torch.ones(1, 2)))


def test_64_true_equals_a_loop_in_float64_bitwise():
    """P4"""
    precision = TruePrecision("64-true")
    module, reference = precision.convert(net()), net().double()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(module.parameters())
    other = torch.optim.Adam(reference.parameters())
    for _ in range(3):
        with precision.forward():
            precision.backward(module(x).square().mean())
        assert precision.step([optimizer], lambda: None)
        reference(x.double()).square().mean().backward()
        other.step()
    assert same(module.state_dict(), reference.state_dict())


def test_the_default_dtype_is_float64_in_forward_and_restored_after_an_error():
    """P6"""
    precision = TruePrecision("64-true")
    seen = []

    def user_code():
        with precision.forward():
            with precision.forward():
                seen.append(torch.zeros(1).dtype)
            seen.append(torch.zeros(1).dtype)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        user_code()
    assert seen == [torch.float64, torch.float64]
    assert torch.zeros(1).dtype is torch.float32
    with TruePrecision("bf16-true").forward():
        assert torch.zeros(1).dtype is torch.float32


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_computes_what_autocast_computes(name):
    """P7"""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[name]
    module, x = net(), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    module.eval()
    with make_precision(name, "cpu").forward():
        mine = module(x)
    with torch.autocast("cpu", dtype=dtype):
        theirs = module(x)
    assert mine.dtype is dtype
    assert torch.equal(mine, theirs)


def test_autocast_contexts_nest_and_are_left_after_an_error():
    """P6"""
    precision = AutocastPrecision("cpu")
    seen = []

    def user_code():
        with precision.forward():
            with precision.forward(), torch.autocast("cpu", enabled=False):
                seen.append(torch.is_autocast_enabled("cpu"))
            seen.append(torch.is_autocast_enabled("cpu"))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        user_code()
    assert seen == [False, True]
    assert not torch.is_autocast_enabled("cpu")
    assert precision.forward() is not precision.forward()


def test_backward_and_update_run_outside_of_autocast():
    """P8: as they do when user code calls them within its forward."""
    precision = AutocastPrecision("cpu")
    weight = nn.Parameter(torch.ones(2, 2))
    seen = []
    weight.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with precision.forward():
        precision.backward((weight @ weight).sum())
        assert precision.step([optimizer], lambda: seen.append(torch.is_autocast_enabled("cpu")))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]


def test_a_device_without_autocast_is_refused():
    """P9"""
    with pytest.raises(UnsupportedError, match="'meta'"):
        AutocastPrecision("meta").forward()


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_format_that_torch_would_turn_off_with_a_warning_is_refused():
    """P9"""
    precision = AutocastPrecision("cpu")
    precision._dtype = torch.float64
    with pytest.raises(UnsupportedError, match="float64"):
        precision.forward()


def test_scaled_updates_equal_a_hand_written_scaler_bitwise():
    """P10"""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    precision, module = ScaledAutocastPrecision("cpu", init_scale=1024.0, growth_interval=2), net()
    optimizer = torch.optim.AdamW(module.parameters())
    reference = net()
    other = torch.optim.AdamW(reference.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for _ in range(5):
        backward(precision, module, x)
        assert precision.step([optimizer], lambda: None)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = reference(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    assert same(snapshot(module, [optimizer]), snapshot(reference, [other]))
    assert precision.state_dict() == scaler.state_dict()
    assert precision.state_dict()["scale"] == 4096.0


def test_prepare_sees_gradients_without_the_scale():
    """P11"""
    weight = nn.Parameter(torch.ones(()))
    precision = ScaledAutocastPrecision("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    precision.backward(weight * 3)
    assert weight.grad.item() == 3 * 1024
    seen = []
    precision.step([optimizer], lambda: seen.append(weight.grad.item()))
    assert seen == [3.0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_move_nothing_and_shrink_the_scale(bad):
    """P10: one optimizer's gradients are finite, and it does not move either."""
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    optimizers = [torch.optim.Adam(part.parameters()) for part in parts]
    precision = ScaledAutocastPrecision("cpu", init_scale=1024.0)
    x = torch.ones(4, 2)

    def update(factor):
        precision.backward(parts[0](x).mean() + (parts[1](x) * factor).mean())
        applied = precision.step(optimizers, lambda: None)
        for item in optimizers:
            item.zero_grad()
        return applied

    assert update(1.0)
    before = snapshot(parts, optimizers)
    assert update(bad) is False
    assert same(snapshot(parts, optimizers), before)
    assert precision.state_dict()["scale"] == 512.0
    assert update(1.0)
    assert not same(snapshot(parts, optimizers), before)


def test_a_fused_optimizer_does_not_move_either():
    """P10"""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    precision = ScaledAutocastPrecision("cpu", init_scale=2.0)
    precision.backward((weight * torch.inf).sum())
    assert precision.step([optimizer], lambda: None) is False
    assert torch.equal(weight, torch.ones(3))
    optimizer.zero_grad()
    precision.backward((weight * 3).sum())
    assert precision.step([optimizer], lambda: None)
    torch.testing.assert_close(weight.data, torch.full((3,), 0.7))


def test_the_device_is_read_once_for_all_optimizers(monkeypatch):
    """P10"""
    weights = [nn.Parameter(torch.ones(())) for _ in range(3)]
    optimizers = [torch.optim.SGD([w], lr=0.1) for w in weights]
    precision = ScaledAutocastPrecision("cpu")
    precision.backward(sum(weights))
    reads = []
    item, truth = torch.Tensor.item, torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "item", lambda t: (reads.append("item"), item(t))[1])
    monkeypatch.setattr(
        torch.Tensor, "__bool__", lambda t: (reads.append("bool"), truth(t))[1], raising=False
    )
    assert precision.step(optimizers, lambda: None)
    assert len(reads) == 1


def test_losses_that_went_backward_together_are_unscaled_alike():
    """P12: the scale would grow after the first update."""
    weights = [nn.Parameter(torch.ones(())) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=1.0) for w in weights]
    precision = ScaledAutocastPrecision("cpu", growth_interval=1)
    for weight in weights:
        precision.backward(weight * 0.5)
    for optimizer in optimizers:
        assert precision.step([optimizer], lambda: None)
    assert [w.item() for w in weights] == [0.5, 0.5]
    assert precision.state_dict()["scale"] == 2.0**17


def test_an_optimizer_may_update_twice_or_have_no_gradient():
    """P12"""
    weight, idle = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    optimizer, other = torch.optim.SGD([weight], lr=1.0), torch.optim.SGD([idle], lr=1.0)
    precision = ScaledAutocastPrecision("cpu", init_scale=4.0)
    precision.backward(weight * 0.5)
    assert precision.step([optimizer], lambda: None)
    assert precision.step([optimizer], lambda: None)
    assert precision.step([other], lambda: None)
    assert precision.step([other], lambda: None)
    precision.backward(weight * 0.5)
    assert idle.item() == 1.0


def test_an_error_in_prepare_leaves_the_scaler_usable():
    """P12"""
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = ScaledAutocastPrecision("cpu", init_scale=4.0)

    def fail():
        raise RuntimeError("mine")

    precision.backward(weight * 0.5)
    with pytest.raises(RuntimeError, match="mine"):
        precision.step([optimizer], fail)
    optimizer.zero_grad()
    precision.backward(weight * 0.5)
    assert precision.step([optimizer], lambda: None)
    assert weight.item() == 0.5


def test_an_update_before_any_backward_through_the_scale_is_refused():
    """P14"""
    weight = nn.Parameter(torch.ones(()))
    weight.sum().backward()
    with pytest.raises(UserCodeError, match=r"instead of loss\.backward"):
        ScaledAutocastPrecision("cpu").step([torch.optim.SGD([weight], lr=0.1)], lambda: None)


def test_float16_parameters_are_refused_where_they_would_be_scaled():
    """P15"""
    with pytest.raises(UnsupportedError, match="'weight' is float16"):
        ScaledAutocastPrecision("cpu").convert(nn.Linear(2, 2).half())


def test_the_scale_is_restored():
    """P13"""
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    first = ScaledAutocastPrecision("cpu", init_scale=8.0, growth_interval=3)
    for _ in range(2):
        first.backward(weight * 1.0)
        first.step([optimizer], lambda: None)
    state = first.state_dict()
    assert all(isinstance(value, (int, float)) for value in state.values())
    second = ScaledAutocastPrecision("cpu")
    second.load_state_dict(state)
    assert second.state_dict() == state
    second.backward(weight * 1.0)
    second.step([optimizer], lambda: None)
    assert second.state_dict()["scale"] == 16.0


def test_a_state_from_a_run_without_a_scale_changes_nothing():
    """P13"""
    precision = ScaledAutocastPrecision("cpu", init_scale=8.0)
    precision.load_state_dict({})
    assert precision.state_dict()["scale"] == 8.0
    full = FullPrecision()
    full.load_state_dict(precision.state_dict())
    assert full.state_dict() == {}


def test_a_foreign_state_is_refused_with_both_sides():
    """P13"""
    with pytest.raises(CheckpointError, match=r"growth_factor.*holds other"):
        ScaledAutocastPrecision("cpu").load_state_dict({"other": 1})


def test_16_mixed_is_refused_where_torch_would_scale_nothing(monkeypatch):
    """P9"""
    monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda self: False)
    precision = ScaledAutocastPrecision("cpu")  # a plan may hold it where no device is
    with pytest.raises(UnsupportedError, match="no loss scaling"):
        precision.convert(nn.Linear(1, 1))


@pytest.mark.parametrize("name", sorted(specs.PRECISIONS))
def test_a_precision_pickles(name):
    """P16: it is made before the processes are."""
    precision = pickle.loads(pickle.dumps(make_precision(name, "cpu")))
    holder = SimpleNamespace(weight=nn.Parameter(torch.ones(())))
    with precision.forward():
        loss = holder.weight * 2
    precision.backward(loss)
    assert precision.step([torch.optim.SGD([holder.weight], lr=0.25)], lambda: None)
    assert holder.weight.item() == 0.5
