"""What is refused by name, and the levels of a library that is no more."""

from __future__ import annotations

import pytest
import torch
from drivetrain_interfaces import ConfigurationError, Precision, UnsupportedError
from torch import nn

from drivetrain_cuda.precision import float8_problem, precision, too_old
from drivetrain_cuda.seeds import ApexMixedPrecisionPlugin


@pytest.mark.parametrize(
    ("capability", "has"), [((7, 5), False), ((8, 0), False), ((8, 9), True), ((9, 0), True)]
)
def test_float8_came_with_a_capability(capability: tuple[int, int], has: bool) -> None:
    reason = too_old("This board", capability)
    assert (reason == "") is has
    if not has:
        assert f"capability {capability[0]}.{capability[1]}" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")
def test_float8_without_a_device_is_refused_by_name() -> None:
    assert float8_problem() == "there is no CUDA device"
    with pytest.raises(UnsupportedError, match="'fp8' was asked for, and there is no CUDA device"):
        precision("fp8").convert(nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("level", "name", "said"),
    [
        ("O0", "32-true", "32-true"),
        ("O1", "16-mixed", "16-mixed"),
        ("O2", "O2", "float32 master weights"),
        ("O3", "16-true", "16-true"),
    ],
)
def test_apex_levels_are_what_they_meant_with_one_notice(level: str, name: str, said: str) -> None:
    with pytest.warns(UserWarning, match=rf"apex.amp does not exist any more.*{said}"):
        plugin = ApexMixedPrecisionPlugin(level, device="cpu")
    assert isinstance(plugin, Precision)
    assert plugin.name == name
    module = plugin.convert(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with plugin.forward():
        loss = module(torch.ones(2, 4)).float().mean() * 0.25
    plugin.backward(loss)
    assert plugin.step([optimizer], lambda: None)
    stored = torch.float16 if level == "O3" else torch.float32
    assert module.weight.dtype is stored


def test_the_default_level_is_o2() -> None:
    with pytest.warns(UserWarning, match="'O2'"):
        assert ApexMixedPrecisionPlugin().name == "O2"


def test_another_level_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"amp_level='O4'.*O0, O1, O2, O3"):
        ApexMixedPrecisionPlugin("O4")
