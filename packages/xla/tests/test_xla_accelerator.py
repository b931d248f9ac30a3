"""The device: random numbers, torch's own helpers on it, and what must be opened first."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from drivetrain_interfaces import UnavailableError
from torch.utils.checkpoint import checkpoint

from drivetrain_xla.accelerator import XlaAccelerator


@pytest.fixture
def device():
    return XlaAccelerator().activate(0, 1)


def test_a_device_that_is_not_there_is_refused():
    """A7"""
    with pytest.raises(UnavailableError, match=r"device 7 .* has 1"):
        XlaAccelerator().activate(7, 1)


def test_torch_knows_the_device_type(device):
    module = torch.get_device_module("xla")
    assert module.current_device() == 0
    assert module.device_count() == 1
    module.synchronize()
    with module.device(0):
        assert torch.ones(1, device="xla").device == device


def test_forked_random_numbers_leave_no_trace(device):
    torch.xla.manual_seed(3)
    wanted = torch.rand(4, device=device).cpu()
    torch.xla.manual_seed_all(3)
    with torch.random.fork_rng(device_type="xla"):
        torch.rand(7, device=device).cpu()
    assert torch.equal(torch.rand(4, device=device).cpu(), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_draws_the_same_dropout_again(device, reentrant):
    """The gradient is that of the numbers that the forward pass drew."""

    def double(x):
        return torch.nn.functional.dropout(x, 0.5, training=True) * 2

    torch.xla.manual_seed(5)
    source = torch.ones(64, device=device, requires_grad=True)
    out = checkpoint(double, source, use_reentrant=reentrant)
    out.sum().backward()
    assert torch.equal(source.grad.cpu(), out.detach().cpu())
    assert 0 < int((out == 0).sum()) < 64


def test_gradients_before_the_runtime_are_told():
    code = (
        "import torch\n"
        "torch.ones(1, requires_grad=True).sum().backward()\n"
        "from drivetrain_interfaces import UnavailableError\n"
        "from drivetrain_xla.runtime import open_runtime\n"
        "try:\n    open_runtime()\nexcept UnavailableError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=True
    )
    assert "Train on XLA first" in done.stdout, done.stderr
