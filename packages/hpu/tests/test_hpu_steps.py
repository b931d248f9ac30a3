"""Steps in eager mode, compiled, and in lazy mode with their marks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import (
    Clip,
    ConfigurationError,
    EvalSpec,
    ManualSpec,
    StepSpec,
    StrategyContext,
    UnsupportedError,
    World,
)
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.steps import EagerEvalStep, EagerTrainStep
from torch import nn

from drivetrain_hpu.accelerator import HpuAccelerator
from drivetrain_hpu.precision import precision
from drivetrain_hpu.strategies import HpuDDP, HpuFSDP, HpuSingleDevice

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]


pytestmark = pytest.mark.timeout(400)


def context(name: str = "32-true", **options: Any) -> StrategyContext:
    return StrategyContext(
        HpuAccelerator(), 0, World(), LocalCollectives(), precision(name), options=options
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return module(batch).square().mean()  # type: ignore[no-any-return]


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 4) for _ in range(4)]


def train(strategy: Any, *, clip: Clip | None = None) -> tuple[list[float], list[float], Any]:
    """Losses, norms and the step of four windows of one."""
    module = strategy.prepare(network())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = strategy.train_step(StepSpec(module, [optimizer], loss, clip=clip))
    results = [step([strategy.feed(batch)]) for batch in batches()]
    strategy.close()
    norms = [float(one.grad_norm) for one in results if one.grad_norm is not None]
    return [float(one.loss) for one in results], norms, step


def by_hand() -> list[float]:
    module, losses = network(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in batches():
        value = loss(module, batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def test_eager_steps_are_the_toolkits_own(device: torch.device) -> None:
    strategy = HpuSingleDevice()(context())
    losses, _, step = train(strategy)
    assert type(step) is EagerTrainStep
    assert losses == pytest.approx(by_hand(), rel=1e-6)
    evaluation = strategy.eval_step(EvalSpec(network(), loss, inference_mode=False))
    assert type(evaluation) is EagerEvalStep


def test_a_compiled_step_uses_the_vendors_compiler(device: torch.device) -> None:
    from habana_frameworks.torch.dynamo.compile_backend import COMPILED

    before = len(COMPILED)
    losses, _, _ = train(HpuSingleDevice(compile=True)(context()))
    assert len(COMPILED) > before
    assert losses == pytest.approx(by_hand(), rel=1e-6)
    assert HpuAccelerator().compilations()["TotalNumber"] == len(COMPILED)


def test_options_of_the_compiler_are_checked_by_it(device: torch.device) -> None:
    options = CompileOptions(options={"force_static_compile": True})
    train(HpuSingleDevice()(context(compile=options)))
    wrong = CompileOptions(options={"no_such": True})
    with pytest.raises(Exception, match="hpu_backend has no options"):
        train(HpuSingleDevice()(context(compile=wrong)))


def test_fused_clipping_gives_the_same_run_and_norm(device: torch.device) -> None:
    clip = Clip(0.05)
    losses, norms, _ = train(HpuSingleDevice()(context()), clip=clip)
    fused, fused_norms, _ = train(HpuSingleDevice(fused_clip=True)(context()), clip=clip)
    assert fused == pytest.approx(losses, rel=1e-6)
    assert fused_norms == pytest.approx(norms, rel=1e-6)
    assert max(norms) > 0.05


def test_the_fused_kernel_uses_up_an_iterator(device: torch.device) -> None:
    from habana_frameworks.torch.hpex.normalization import FusedClipNorm

    parameter = nn.Parameter(torch.ones(3, device=device))
    parameter.grad = torch.full((3,), 10.0, device=device)
    FusedClipNorm([parameter], 1.0).clip_norm(one for one in [parameter])
    assert float(parameter.grad.max()) == 10.0  # not clipped: it had come to its end
    FusedClipNorm([parameter], 1.0).clip_norm([parameter])
    assert float(parameter.grad.max()) < 1.0


def test_fused_clipping_by_value_is_refused(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match="clipping is by 'value'"):
        train(HpuSingleDevice(fused_clip=True)(context()), clip=Clip(1.0, by="value"))


def test_graphs_are_for_lazy_mode(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match="eager mode, which has none"):
        train(HpuSingleDevice(graphs=["0"])(context()))


def test_options_that_exclude_a_manual_step_are_named(device: torch.device) -> None:
    strategy = HpuSingleDevice(compile=True)(context())
    spec = ManualSpec(network(), [], loss)
    with pytest.raises(UnsupportedError, match="compile was asked"):
        strategy.manual_step(spec)


def test_inference_mode_and_shared_batch_statistics_are_refused(device: torch.device) -> None:
    strategy = HpuSingleDevice()(context())
    with pytest.raises(UnsupportedError, match="inference_mode"):
        strategy.eval_step(EvalSpec(network(), loss))


def test_ddp_has_the_settings_that_gaudi_needs(device: torch.device) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    strategy = HpuDDP()(context())
    settings = strategy.ddp_kwargs
    assert settings["gradient_as_bucket_view"]
    assert not settings["find_unused_parameters"]
    assert strategy.device_ids is None
    with pytest.raises(UnsupportedError, match="bf16_compress_hook"):
        HpuDDP(comm_hook=bf16_compress_hook)(context())
    with pytest.raises(ConfigurationError, match="graphs='net'"):
        HpuDDP()(context(graphs="net"))


def test_sharding_refuses_what_needs_whole_parameters(device: torch.device) -> None:
    with pytest.raises(UnsupportedError, match="divided over ranks"):
        HpuFSDP()(context(fused_clip=True))


LAZY = """
import torch
from torch import nn
from drivetrain_interfaces import (EvalSpec, ManualSpec, StepHooks, StepSpec, StrategyContext,
                                   UnsupportedError, World)
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_hpu.accelerator import HpuAccelerator
from drivetrain_hpu.precision import precision
from drivetrain_hpu.strategies import HpuSingleDevice
from fake_gaudi.marks import CALLS

class Noted(torch.optim.SGD):
    def step(self, closure=None):
        CALLS.append("step")
        super().step(closure)

def loss(module, batch):
    return module(batch).square().mean()

def bind(**options):
    return HpuSingleDevice(**options)(StrategyContext(
        HpuAccelerator(), 0, World(), LocalCollectives(), precision("32-true")))

torch.manual_seed(0)
strategy = bind()
module = strategy.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
hooks = StepHooks(after_backward=lambda: CALLS.append("hook"))
optimizer = Noted(module.parameters(), lr=0.1)
step = strategy.train_step(StepSpec(module, [optimizer], loss, accumulate=2, hooks=hooks))
batch = strategy.feed(torch.ones(6, 4))
CALLS.clear()
with step:
    step([batch, batch])
assert CALLS == ["hook", "mark_step", "hook", "mark_step", "step", "mark_step"], CALLS
CALLS.clear()
with strategy.eval_step(EvalSpec(module, loss, inference_mode=False)) as evaluate:
    evaluate(batch)
assert CALLS == ["mark_step"], CALLS
CALLS.clear()
manual = strategy.manual_step(ManualSpec(module, [optimizer], loss))
manual.backward(manual(batch))
manual.update(optimizer)
assert CALLS == ["mark_step", "step", "mark_step"], CALLS
strategy.close()

def run(**options):
    torch.manual_seed(0)
    strategy = bind(**options)
    module = strategy.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = strategy.train_step(StepSpec(module, [optimizer], loss))
    with step:
        found = [float(step([strategy.feed(torch.full((3, 4), 0.1 * k))]).loss) for k in range(4)]
    strategy.close()
    return found, module

plain, _ = run()
CALLS.clear()
graphed, module = run(graphs=["0", "2"])
assert graphed == plain, (graphed, plain)
assert CALLS.count("capture") == 2 and CALLS.count("replay") == 6, CALLS
assert "forward" not in vars(module[0])
for options, words in (({"compile": True}, "in lazy mode"), ({"graphs": ["9"]}, "graphs=['9']")):
    try:
        run(**options)
    except (UnsupportedError, ValueError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(options)
# A graph whose gradients were dropped in between fails, and so does one with gradient hooks.
cacher = torch.hpu.ModuleCacher(max_graphs=1)
layer = nn.Linear(2, 2).to("hpu")
cacher(model=layer)
layer(torch.ones(1, 2, device="hpu")).sum().backward()
layer.zero_grad(set_to_none=True)
for value, words in ((torch.ones(1, 2), "gradient is gone"), (torch.ones(3, 2), "max_graphs")):
    try:
        layer(value.to("hpu"))
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
hooked = nn.Linear(2, 2).to("hpu")
hooked.register_full_backward_hook(lambda *args: None)
try:
    cacher(model=hooked)
except RuntimeError as error:
    assert "gradient hooks" in str(error)
else:
    raise AssertionError("hooks")
"""


def test_lazy_mode_has_exact_marks_and_graphs(run_python: Run) -> None:
    run_python(LAZY, PT_HPU_LAZY_MODE="1")


def test_the_profiler_is_looked_up_after_the_bridge(device: torch.device) -> None:
    from torch.profiler import ProfilerActivity

    from drivetrain_hpu.profiler import profile

    ready: list[Any] = []
    with profile(on_trace_ready=ready.append) as profiler:
        for _ in range(5):
            torch.ones(2, device=device).add(1)
            profiler.step()
    assert len(ready) == 1
    assert [one.name for one in profiler.asked] == ["CPU", "HPU"]
    assert all(isinstance(one, ProfilerActivity) for one in profiler.asked)
    with pytest.raises(TypeError):
        torch.profiler.profile(acc_events=True)
    with pytest.raises(TypeError, match="another class"):
        torch.profiler.profile(activities=[torch._C._profiler.ProfilerActivity.CPU])


def test_a_profile_that_crashes_the_vendors_tool_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from drivetrain_hpu.profiler import profile

    with pytest.raises(ConfigurationError, match="active=1"):
        profile(active=1)
    monkeypatch.setenv("HABANA_PROFILE", "profile_api")
    with pytest.raises(ConfigurationError, match="HABANA_PROFILE='profile_api'"):
        profile()
