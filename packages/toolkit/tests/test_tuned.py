"""What can be put around any strategy: compiled losses, fused optimizers, words about memory."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from drivetrain_cpu.accelerator import CpuAccelerator
from drivetrain_interfaces import (
    ConfigurationError,
    EvalSpec,
    ManualSpec,
    StepSpec,
    Strategy,
    StrategyContext,
    SupportsManualStep,
    UnsupportedError,
    World,
)
from torch import nn

from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.feeding import SideStreamFeed
from drivetrain_toolkit.fused import use_fused
from drivetrain_toolkit.memory import DeviceMemoryError
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.strategies import DDPStrategy, SingleDeviceStrategy
from drivetrain_toolkit.tuned import Tuned


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(3)
    yield
    torch.compiler.reset()


def context(precision="32-true", accelerator=None):
    return StrategyContext(
        accelerator or CpuAccelerator(),
        0,
        World(),
        LocalCollectives(),
        make_precision(precision, "cpu"),
    )


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def mean_square(module, batch):
    return module(batch[0]).sub(batch[1]).square().mean()


_DRAW = torch.Generator().manual_seed(9)
BATCHES = [
    (torch.randn(4, 8, generator=_DRAW), torch.randn(4, 1, generator=_DRAW)) for _ in range(6)
]


def train(strategy, *, precision="32-true", optimizer=torch.optim.AdamW, loss=mean_square):
    bound = strategy(context(precision))
    module = bound.prepare(net())
    step = bound.train_step(StepSpec(module, [optimizer(module.parameters(), lr=0.05)], loss))
    with step:
        losses = [step([bound.feed(batch)]).loss.item() for batch in BATCHES]
    return losses, bound


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("aot_eager", "32-true"), ("eager", "bf16-mixed"), ("eager", "16-mixed")],
)
def test_a_compiled_step_trains_as_one_that_is_not(backend, precision):
    plain, _ = train(SingleDeviceStrategy(), precision=precision)
    options = CompileOptions(backend=backend, fullgraph=True)
    compiled, _ = train(Tuned(SingleDeviceStrategy(), compile=options), precision=precision)
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_what_is_compiled_is_the_loss_with_what_it_calls():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def loss(module, batch):
        with torch.no_grad():
            torch.zeros(1)
        return mean_square(module, batch)

    train(Tuned(SingleDeviceStrategy(), compile=CompileOptions(backend=count)), loss=loss)
    assert len(graphs) == 1, "six batches of one shape are one graph"


@pytest.mark.skipif(
    "DRIVETRAIN_INDUCTOR" not in os.environ, reason="a minute: set DRIVETRAIN_INDUCTOR"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch, of its own older parts
def test_the_default_compiler_generates_code_here():
    plain, _ = train(SingleDeviceStrategy())
    compiled, _ = train(Tuned(SingleDeviceStrategy(), compile=True))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigurationError, match=r"mode='max-autotune', options="):
        CompileOptions(mode="max-autotune", options={"trace.enabled": True})


def test_a_compiled_manual_step_is_refused():
    bound = Tuned(SingleDeviceStrategy(), compile=True)(context())
    module = bound.prepare(net())
    with pytest.raises(UnsupportedError, match="compiled manual step"):
        bound.manual_step(ManualSpec(module, [], lambda m: m))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_optimizers_update_as_others_do(kind):
    plain, _ = train(SingleDeviceStrategy(), optimizer=kind)
    fused, bound = train(Tuned(SingleDeviceStrategy(), fused=True), optimizer=kind)
    assert fused == pytest.approx(plain, rel=1e-4)
    assert bound.state().optimizers[0]["groups"][0]["fused"] is True


def test_the_state_of_a_fused_optimizer_is_restored():
    _, first = train(Tuned(SingleDeviceStrategy(), fused=True))
    second = Tuned(SingleDeviceStrategy(), fused=True)(context())
    module = second.prepare(net())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    step = second.train_step(StepSpec(module, [optimizer], mean_square))
    second.load(first.state())
    for batch in BATCHES:
        step([second.feed(batch)])
    assert optimizer.state_dict()["state"][0]["step"] == 2 * len(BATCHES)
    assert optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (torch.optim.RMSprop, "RMSprop has no fused kernel"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "Adam is to be differentiated"),
        (type("Mine", (torch.optim.Adam,), {}), "Mine has no fused kernel"),
    ],
)
def test_an_optimizer_without_a_fused_kernel_is_refused_and_no_other_is_changed(make, match):
    good = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=match):
        use_fused([good, make(net().parameters())])
    assert not good.param_groups[0]["fused"]


def test_an_optimizer_that_has_made_a_step_is_refused():
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    mean_square(module, BATCHES[0]).backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="has made a step already"):
        use_fused([optimizer])


def test_it_is_a_strategy_with_what_the_inner_one_carries():
    inner = DDPStrategy()
    inner.launcher = "spawn"
    tuned = Tuned(inner, compile=CompileOptions(backend="eager"))
    assert tuned.name == "ddp"
    assert tuned.launcher == "spawn"
    copied = pickle.loads(pickle.dumps(tuned))
    bound = copied(context())
    assert isinstance(bound, Strategy)
    assert isinstance(bound, SupportsManualStep)
    assert bound.device == torch.device("cpu")
    with pytest.raises(AttributeError):
        _ = tuned.nothing_of_that_name
    bound.close()
    bound.close()


def test_optional_abilities_of_the_inner_strategy_are_kept():
    class Able(SingleDeviceStrategy):
        def special(self):
            return self.device

    assert Tuned(Able())(context()).special() == torch.device("cpu")


def test_a_strategy_without_manual_steps_is_told_so():
    class Whole(SingleDeviceStrategy):
        manual_step = None

    bound = Tuned(Whole())(context())
    with pytest.raises(UnsupportedError, match="'single_device' does not offer"):
        bound.manual_step(ManualSpec(net(), [], lambda m: m))


def test_running_out_of_memory_says_what_is_there():
    """The allocation is one that a device would refuse; torch raises the same class there."""

    def loss(module, batch):
        if len(seen) == 2:
            raise torch.OutOfMemoryError("Tried to allocate 7.00 GiB. GPU 0 has a total ...")
        seen.append(batch)
        return mean_square(module, batch)

    seen = []
    with pytest.raises(DeviceMemoryError) as caught:
        train(Tuned(SingleDeviceStrategy()), loss=loss)
    text = str(caught.value)
    assert text.startswith("cpu ran out of memory in a train step: Tried to allocate 7.00 GiB")
    assert "parameter 644 bytes" in text
    assert "optimizer state" in text
    assert "gradients, when complete 644 bytes" in text
    assert "parameter 0.weight (16×8, float32)" in text
    assert "exp_avg" in text
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert type(caught.value.__cause__) is torch.OutOfMemoryError
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_evaluation_says_it_as_well():
    def refuse(_module, _batch):
        raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")

    bound = Tuned(SingleDeviceStrategy())(context())
    module = bound.prepare(net())
    step = bound.eval_step(EvalSpec(module, refuse))
    with pytest.raises(DeviceMemoryError, match="in an evaluation step"):
        step(BATCHES[0])


def test_other_errors_pass_unchanged():
    def loss(module, batch):
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own"):
        train(Tuned(SingleDeviceStrategy()), loss=loss)


def test_a_batch_that_is_there_is_not_copied():
    accelerator = SimpleNamespace(copy_stream=lambda device: None)
    feed = SideStreamFeed(accelerator, torch.device("cpu"))
    for batch in (BATCHES[0], list(BATCHES[0]), BATCHES[0][0]):
        assert feed(batch) is batch
