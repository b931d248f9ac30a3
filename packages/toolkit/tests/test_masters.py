"""Half precision with master weights, and ranks that decide on an update together."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from drivetrain_interfaces import Precision, ReduceOp, UnsupportedError
from torch import nn

from drivetrain_toolkit.masters import MasterWeightsPrecision
from drivetrain_toolkit.precision import ScaledAutocastPrecision, make_precision
from drivetrain_toolkit.seeds import (
    FullyShardedNativeMixedPrecisionPlugin,
    ShardedNativeMixedPrecisionPlugin,
)


def masters():
    return MasterWeightsPrecision("cpu", init_scale=8.0)


class Net(nn.Module):
    """Notes in which format its parts compute."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 2)
        self.seen = []

    def forward(self, x, index=None):
        x = self.first(x)
        self.seen.append((self.first.weight.dtype, x.dtype, self.norm.weight.dtype))
        return self.last(self.norm(x).relu())


def train(precision, module, steps=3, rate=0.1):
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    torch.manual_seed(1)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    for _ in range(steps):
        with precision.forward():
            loss = (module(x) - y).square().mean()
        precision.backward(loss)
        assert precision.step([optimizer], lambda: None)
        optimizer.zero_grad()
    return loss


def test_it_is_a_precision_that_pickles():
    precision = masters()
    assert isinstance(precision, Precision)
    copy = pickle.loads(pickle.dumps(precision))
    assert copy.name == "O2"
    assert copy.policy.compute == "float16"
    assert copy.policy.loss_scaling


def test_modules_compute_in_half_and_batch_normalization_in_full():
    precision = masters()
    module = precision.convert(Net())
    loss = train(precision, module, steps=1)
    assert module.seen == [(torch.float32, torch.float16, torch.float32)]
    assert loss.dtype is torch.float32, "what the module returns is float32"


def test_parameters_gradients_and_names_stay_as_they_were():
    precision = masters()
    module = Net()
    before, names = list(module.parameters()), list(module.state_dict())
    converted = precision.convert(precision.convert(module))
    train(precision, converted)
    assert converted is module
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert list(module.state_dict()) == names
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert len(module.first._forward_pre_hooks) == 1, "converted twice is converted"


def test_updates_that_half_precision_would_lose_are_kept():
    def moved(precision, step=2.0**-14):
        layer = precision.convert(nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            layer.weight.fill_(1.0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=step)
        for _ in range(8):
            with precision.forward():
                loss = layer(torch.ones(1, 1)).sum()
            precision.backward(loss)
            precision.step([optimizer], lambda: None)
            optimizer.zero_grad()
        return 1.0 - layer.weight.item()

    assert moved(masters()) == pytest.approx(8 * 2.0**-14)
    assert moved(make_precision("16-true", "cpu")) == 0.0


def test_it_trains_as_full_precision_does_within_half_precision():
    torch.manual_seed(0)
    module, twin = Net(), Net()
    twin.load_state_dict(module.state_dict())
    precision = masters()
    mine = train(precision, precision.convert(module), steps=20)
    full = train(make_precision("32-true", "cpu"), twin, steps=20)
    assert mine.item() == pytest.approx(full.item(), rel=0.02)


def test_an_exception_in_a_forward_gives_the_parameters_back():
    precision = masters()
    module = precision.convert(Net())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.ones(2, 3))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(isinstance(p, nn.Parameter) for p in module.first._parameters.values())
    train(precision, module)


def test_a_module_that_calls_itself_gets_its_parameters_back():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x, depth=2):
            return x * self.weight if depth == 0 else self(x, depth - 1) + self.weight

    precision = masters()
    module = precision.convert(Twice())
    precision.backward(module(torch.ones(2)).sum())
    assert type(module.weight) is nn.Parameter
    assert module.weight.grad.tolist() == [24.0, 24.0], "three uses, times the scale"


def test_recurrent_modules_compute_in_half_and_get_their_list_back():
    class Bfloat(MasterWeightsPrecision):
        _dtype = torch.bfloat16  # float16 has no recurrent kernel on a CPU

    precision = Bfloat("cpu", init_scale=8.0)
    module = precision.convert(nn.LSTM(4, 3))
    dtypes = []
    module.register_forward_hook(lambda m, a, out: dtypes.append(m._flat_weights[0].dtype))
    out, _ = module(torch.randn(5, 2, 4))
    precision.backward(out.sum())
    assert out.dtype is torch.float32
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    assert all(p.grad is not None for p in module.parameters())


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    precision = masters()
    module = precision.convert(Tied())
    precision.backward(module(torch.ones(1, 4)).sum())
    assert module.a.weight is module.b.weight


def test_parameters_in_half_precision_are_refused():
    with pytest.raises(UnsupportedError, match=r"'0\.weight' is float16"):
        masters().convert(nn.Sequential(nn.Linear(1, 1).half()))


def test_a_converted_module_pickles():
    module = masters().convert(Net())
    assert list(pickle.loads(pickle.dumps(module)).state_dict()) == list(module.state_dict())


class Others:
    """Collectives in which another rank found what it found."""

    def __init__(self, found):
        self.found = found
        self.asked = 0

    def all_reduce(self, tensor, op):
        assert op is ReduceOp.MAX
        self.asked += 1
        return torch.maximum(tensor, torch.full_like(tensor, self.found))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_an_update_that_another_rank_cannot_apply_is_applied_nowhere(found):
    precision = ScaledAutocastPrecision("cpu", init_scale=4.0)
    others = Others(found)
    precision.decide_with(others)
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    precision.backward(weight * 1.0)
    assert precision.step([optimizer], lambda: None) is (found == 0.0)
    assert weight.item() == (0.5 if found == 0.0 else 1.0)
    assert precision.state_dict()["scale"] == (4.0 if found == 0.0 else 2.0)
    assert others.asked == 1


def test_a_rank_without_gradients_decides_as_well():
    precision = ScaledAutocastPrecision("cpu", init_scale=4.0)
    others = Others(1.0)
    precision.decide_with(others)
    weight, other = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    precision.backward(other * 1.0)
    assert not precision.step([torch.optim.SGD([weight], lr=0.5)], lambda: None)
    assert precision.state_dict()["scale"] == 2.0
    assert others.asked == 1


@pytest.mark.parametrize(
    "kind", [ShardedNativeMixedPrecisionPlugin, FullyShardedNativeMixedPrecisionPlugin]
)
def test_the_older_names_are_precisions(kind):
    assert isinstance(kind(16, "cpu"), Precision)
    assert kind(16, "cpu").name == "16-mixed"
    assert kind("bf16", "cpu").name == "bf16-mixed"
    scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    precision = pickle.loads(pickle.dumps(kind(16, "cpu", scaler)))
    assert precision.state_dict()["scale"] == 32.0


RANK = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from drivetrain_toolkit.seeds import ShardedNativeMixedPrecisionPlugin
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 3, False, timedelta(seconds=60), wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
precision = ShardedNativeMixedPrecisionPlugin(16, "cpu")
weight = torch.nn.Parameter(torch.ones(()))
optimizer = torch.optim.SGD([weight], lr=0.5)
applied = []
for factor in (1.0, float("inf") if rank else 1.0, 1.0):
    precision.backward(weight * factor)
    applied.append(precision.step([optimizer], lambda: None))
    optimizer.zero_grad()
print(applied, weight.item(), precision.state_dict()["scale"])
dist.destroy_process_group()
"""


def test_two_real_ranks_decide_together(tmp_path):
    """The gradient of one of them overflows in the second of three updates."""
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(store.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for out, error in ends:
        # Gloo of some versions of torch (2.9) has a word for stdout.
        told = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert told == ["[True, False, True] 0.0 32768.0"], error
