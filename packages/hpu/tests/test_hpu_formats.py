"""Precisions, the vendor's engine for float8, fused optimizers, quantizing, checkpoints."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import UnsupportedError
from torch import nn

from drivetrain_hpu.checkpoint import HpuCheckpointIO
from drivetrain_hpu.optimizers import carry_step_count, fused_adamw
from drivetrain_hpu.precision import HpuFloat8Precision, Recipe, precision
from drivetrain_hpu.quantizing import finish_measuring, quantized

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., subprocess.CompletedProcess[str]]


pytestmark = pytest.mark.timeout(400)


def test_autocast_is_entered_for_two_formats_and_never_for_float32(device: torch.device) -> None:
    layer = nn.Linear(4, 4).to(device)
    value = torch.ones(2, 4, device=device)
    for name, wanted in (
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("16-mixed", torch.float16),
    ):
        made = precision(name)
        with made.forward():
            assert torch.is_autocast_enabled("hpu") == (name != "32-true")
            assert layer(value).dtype is wanted


@pytest.mark.parametrize("name", ["16-true", "64-true", "int8"])
def test_other_formats_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"precision '{name}', which it does not declare"):
        precision(name)


@pytest.mark.parametrize("name", ["16-mixed", "fp8"])
def test_the_first_generation_is_refused_when_the_module_is_there(
    name: str, device: torch.device, gaudi: Callable[..., None]
) -> None:
    made = precision(name)  # not before: this may be a process that opens no device
    gaudi(generation="GAUDI")
    with pytest.raises(UnsupportedError, match="the first generation of Gaudi"):
        made.convert(nn.Linear(16, 16))


def test_float8_layers_keep_their_parameters_and_others_stay(device: torch.device) -> None:
    import intel_transformer_engine as te

    network = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 3), nn.Linear(32, 16, bias=False))
    before = [dict(layer.named_parameters()) for layer in network]
    made = HpuFloat8Precision(Recipe(interval=1))
    converted: Any = made.convert(network)
    kinds = [type(layer) for layer in converted]
    assert kinds == [te.Linear, nn.Linear, te.Linear]
    for layer, held in zip(converted, before, strict=True):
        for name, parameter in held.items():
            assert getattr(layer, name) is parameter
    converted.to(device)
    te.RAN_IN.clear()
    with made.forward():
        converted[0](torch.ones(2, 16, device=device))
    with torch.no_grad(), made.forward():
        converted[0](torch.ones(2, 16, device=device))
    assert [enabled for enabled, _ in te.RAN_IN] == [True, False]
    used = te.RAN_IN[0][1]
    assert (used.interval, used.margin, used.reduce_amax) == (1, 0, False)
    assert used.fp8_format is te.recipe.Format.HYBRID
    assert te.OPEN == []


def test_a_recipe_has_to_be_complete() -> None:
    import intel_transformer_engine as te

    with pytest.raises(TypeError):
        te.recipe.DelayedScaling(margin=0, interval=1)


def pair(device: torch.device) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(2)
    mine = nn.Linear(3, 2).to(device)
    other = nn.Linear(3, 2).to(device)
    other.load_state_dict(mine.state_dict())
    return mine, other


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module(torch.ones(1, 3, device="hpu")).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_fused_adamw_goes_the_way_of_torchs(device: torch.device) -> None:
    mine, other = pair(device)
    fused, usual = (
        fused_adamw(mine.parameters(), lr=0.01),
        torch.optim.AdamW(other.parameters(), 0.01),
    )
    for _ in range(5):
        step(mine, fused)
        step(other, usual)
    assert torch.allclose(mine.weight, other.weight, atol=1e-5)


def test_fused_adamw_counts_steps_in_its_group(device: torch.device) -> None:
    mine, _ = pair(device)
    fused = fused_adamw(mine.parameters())
    step(mine, fused)
    step(mine, fused)
    assert fused.param_groups[0]["step"] == 2
    assert {int(state["step"]) for state in fused.state.values()} == {0}


def test_a_state_of_torchs_adamw_keeps_its_count(device: torch.device) -> None:
    mine, other = pair(device)
    usual = torch.optim.AdamW(other.parameters(), lr=0.01)
    for _ in range(3):
        step(other, usual)
    mine.load_state_dict(other.state_dict())
    fused = fused_adamw(mine.parameters(), lr=0.01)
    fused.load_state_dict(
        {
            "state": copy.deepcopy(usual.state_dict()["state"]),
            "param_groups": fused.state_dict()["param_groups"],
        }
    )
    carry_step_count(fused)
    assert fused.param_groups[0]["step"] == 3
    step(mine, fused)
    step(other, usual)
    assert torch.allclose(mine.weight, other.weight, atol=1e-5)


def test_sparse_gradients_are_none_for_the_fused_optimizer(device: torch.device) -> None:
    from habana_frameworks.torch.hpex.optimizers import FusedAdamW

    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.sparse_coo_tensor(
        torch.tensor([[0]]), [1.0], (3,), check_invariants=True
    )
    with pytest.raises(RuntimeError, match="sparse"):
        FusedAdamW([parameter]).step()


@pytest.mark.parametrize(("mode", "turned"), [("MEASURE", "prepared"), ("QUANTIZE", "converted")])
def test_quantizing_returns_the_new_module(
    mode: str, turned: str, tmp_path: Path, device: torch.device
) -> None:
    from fake_gaudi.marks import CALLS

    CALLS.clear()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mode": mode}), encoding="utf-8")
    given = nn.Linear(4, 4)
    found = quantized(given, str(config))
    assert found is not given
    assert not hasattr(given, "turned")
    assert getattr(found, "turned") == turned  # noqa: B009
    assert not found.training
    assert next(found.parameters()).device == device
    assert CALLS == ["hpu_set_inference_env", "hpu_inference_initialize"]
    assert json.loads(config.read_text(encoding="utf-8")) == {"mode": mode}
    if mode == "MEASURE":
        finish_measuring(found)


def test_tied_weights_stay_tied_in_files(tmp_path: Path, device: torch.device) -> None:
    weight = torch.arange(6.0, device=device).view(2, 3)
    io = HpuCheckpointIO()
    io.save({"model": {"one": weight, "two": weight, "view": weight.t()}}, str(tmp_path / "c"))
    found: Any = io.load(str(tmp_path / "c"))["model"]
    assert found["one"] is found["two"] or found["one"].data_ptr() == found["two"].data_ptr()
    assert found["one"].device.type == "cpu"
    assert found["view"].equal(weight.t().cpu())


LAZY = """
import sys
import torch
from drivetrain_hpu.bridge import load_bridge
load_bridge()
from fake_gaudi.marks import CALLS
from drivetrain_hpu.checkpoint import HpuCheckpointIO
weight = torch.arange(6.0, device="hpu")
tree = {"model": {"one": weight, "two": weight}}
CALLS.clear()
io = HpuCheckpointIO()
io.save(tree, sys.argv[1] + "/c")
assert CALLS[:1] == ["mark_step"], CALLS
found = io.load(sys.argv[1] + "/c")["model"]
assert found["one"].data_ptr() == found["two"].data_ptr()
io.convert(sys.argv[1] + "/c", sys.argv[1] + "/single.pt", "torch")
# What the bridge's own function would have written:
torch.save(tree, sys.argv[1] + "/vendor.pt")
vendor = torch.load(sys.argv[1] + "/vendor.pt")["model"]
assert vendor["one"].data_ptr() != vendor["two"].data_ptr()
"""
PLAIN = """
import sys
import torch
found = torch.load(sys.argv[1] + "/single.pt", weights_only=True)["model"]
assert found["one"].data_ptr() == found["two"].data_ptr()
assert found["one"].device.type == "cpu"
assert not hasattr(torch, "hpu")
"""


def test_lazy_mode_writes_files_that_stock_torch_reads(run_python: Run, tmp_path: Path) -> None:
    run_python(LAZY, str(tmp_path), PT_HPU_LAZY_MODE="1")
    run_python(PLAIN, str(tmp_path), PYTHONPATH="")


def test_older_names_are_the_parts_of_today(device: torch.device) -> None:
    from drivetrain_hpu import seeds
    from drivetrain_hpu.strategies import HpuDDP, HpuSingleDevice

    assert issubclass(seeds.SingleHPUStrategy, HpuSingleDevice)
    assert issubclass(seeds.HPUParallelStrategy, HpuDDP)
    assert seeds.HPUPrecisionPlugin("bf16").name == "bf16-mixed"
    assert seeds.HPUPrecisionPlugin(precision=32).name == "32-true"
    assert seeds.HPUParallelStrategy(checkpoint_io=seeds.HPUCheckpointIO()).checkpoint_io
    with pytest.warns(UserWarning, match="not used"):
        seeds.HPUPrecisionPlugin("bf16", bf16_file_path="ops.txt")
