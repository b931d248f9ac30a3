"""Linear layers in float8, emulated by torchao on the CPU."""

from __future__ import annotations

import pickle
import sys
import warnings

import pytest
import torch
from drivetrain_interfaces import Precision, UnsupportedError
from torch import nn

from drivetrain_toolkit.float8 import Float8Precision


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip("torchao.float8.float8_linear", reason="torchao is not here")


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def emulated():
    return Float8Precision("cpu", emulate=True)


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16), nn.Linear(16, 1))


def test_it_is_a_precision_that_pickles():
    precision = pickle.loads(pickle.dumps(Float8Precision("cpu")))
    assert isinstance(precision, Precision)
    assert precision.name == "fp8"


def test_layers_of_fitting_sizes_are_replaced_and_parameters_stay(torchao):
    module = net()
    before, names = list(module.parameters()), list(module.state_dict())
    converted = emulated().convert(emulated().convert(module))
    kinds = [isinstance(part, torchao.Float8Linear) for part in converted]
    assert kinds == [True, False, True, False], "the last gives one number: no multiple of 16"
    assert all(a is b for a, b in zip(before, converted.parameters(), strict=True))
    assert list(converted.state_dict()) == names
    copy = pickle.loads(pickle.dumps(converted))
    assert list(copy.state_dict()) == names


def test_it_trains_nearly_as_full_precision_does(torchao):
    torch.manual_seed(4)
    x, y = torch.randn(64, 32), torch.randn(64, 1)

    def train(precision, module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            with precision.forward():
                loss = (module(x) - y).square().mean()
            precision.backward(loss)
            assert precision.step([optimizer], lambda: None)
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    from drivetrain_toolkit.precision import make_precision

    precision = emulated()
    eight = train(precision, precision.convert(net()))
    full = train(make_precision("32-true", "cpu"), net())
    assert eight[-1] < 0.6 * eight[0]
    assert eight[-1] == pytest.approx(full[-1], rel=0.15)
    assert eight != full, "something was rounded"


def test_a_module_without_a_fitting_layer_is_told(torchao):
    with pytest.warns(UserWarning, match="none of 1 linear layers has sizes that are multiples"):
        emulated().convert(nn.Sequential(nn.Linear(3, 5)))


def test_a_device_without_float8_is_refused_by_name():
    precision = Float8Precision("cpu", problem=old_board)
    with pytest.raises(UnsupportedError, match=r"'fp8' was asked for, and board 7 has none"):
        precision.convert(net())


def old_board() -> str:
    return "board 7 has none"


def test_a_missing_torchao_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UnsupportedError, match=r"needs torchao.*Install torchao"):
        emulated().convert(net())
