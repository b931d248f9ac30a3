"""When a module is replayed and when it is not. The capture itself needs a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_interfaces import (
    ConfigurationError,
    EvalSpec,
    ManualSpec,
    StepSpec,
    StrategyContext,
    UnsupportedError,
    World,
)
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from drivetrain_cuda import FACTS
from drivetrain_cuda.graphs import Graphed


class OnHost:
    """The accelerator's part of a bound strategy, on the host."""

    facts = FACTS
    device_type = "cpu"

    def device_count(self) -> int:
        return 1

    def activate(self, index: int, local_size: int) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, device: torch.device) -> None:
        pass

    def close(self) -> None:
        pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def square(module: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = module(batch).square().mean()
    return out


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Torch's capture, replaced by one that runs the module and notes what it was given."""
    seen: list[tuple[Any, ...]] = []

    def make(body: nn.Module, samples: tuple[Tensor, ...]) -> Any:
        body(*samples)  # as torch warms up
        seen.append((samples, torch.is_autocast_cache_enabled()))

        def replay(*args: Tensor) -> Any:
            seen.append(("replayed", args[0].shape))
            return body(*args)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return seen


def bound(precision: str = "32-true", world: World | None = None, **options: Any) -> Any:
    kind = DDPStrategy() if world else SingleDeviceStrategy()
    names = options.pop("modules", ["body"])
    context = StrategyContext(
        OnHost(),
        0,
        world or World(),
        LocalCollectives(),
        make_precision(precision, "cpu"),
    )
    return Graphed(kind, names, **options)(context)


def step_of(strategy: Any) -> tuple[Any, Net]:
    torch.manual_seed(0)
    module = strategy.prepare(Net())
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    return strategy.train_step(StepSpec(module, [sgd], square)), module


def test_the_first_forward_captures_and_all_of_its_shape_are_replayed(
    captures: list[tuple[Any, ...]],
) -> None:
    step, _ = step_of(bound())
    for _ in range(3):
        step([torch.ones(8, 4)])
    (samples, cached), *replays = captures
    assert samples[0].shape == (8, 4)
    assert not cached, "autocast remembers no cast across the capture"
    assert replays == [("replayed", torch.Size([8, 4]))] * 3


def test_it_trains_as_one_that_is_not_a_graph(captures: list[tuple[Any, ...]]) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(8, 4) for _ in range(4)]
    step, module = step_of(bound())
    plain = SingleDeviceStrategy()(bound()._inner.context)
    other, twin = step_of(plain)
    for batch in batches:
        assert torch.equal(step([batch]).loss, other([batch]).loss)
    for name, value in module.state_dict().items():
        same = torch.equal(value, twin.state_dict()[name])
        # A counter is an integer buffer; warming up must not have moved it either.
        assert same, name


def test_other_shapes_run_as_usual_and_that_is_told_once(
    captures: list[tuple[Any, ...]],
) -> None:
    step, _ = step_of(bound())
    step([torch.ones(8, 4)])
    with pytest.warns(UserWarning, match=r"'body' is a CUDA graph for the shapes \[\(8, 4\)\]"):
        step([torch.ones(3, 4)])
    step([torch.ones(3, 4)])
    assert len(captures) == 2


def test_evaluation_is_not_replayed(captures: list[tuple[Any, ...]]) -> None:
    strategy = bound()
    step, module = step_of(strategy)
    step([torch.ones(8, 4)])
    strategy.eval_step(EvalSpec(module, square))(torch.ones(8, 4))
    module.eval()
    module.body(torch.ones(8, 4))
    assert len(captures) == 2


def test_closing_gives_the_modules_their_forwards_back(captures: list[tuple[Any, ...]]) -> None:
    strategy = bound()
    _, module = step_of(strategy)
    assert "forward" in vars(module.body)
    strategy.close()
    assert "forward" not in vars(module.body)
    assert module(torch.ones(2, 4)).shape == (2, 1)


def test_a_module_that_takes_something_else_is_refused(captures: list[tuple[Any, ...]]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x, 2.0) * self.weight
            return out

    strategy = bound()
    module = strategy.prepare(Scaled())
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    step = strategy.train_step(StepSpec(module, [sgd], square))
    with pytest.raises(UnsupportedError, match=r"'body' was to be a CUDA graph.*a float"):
        step([torch.ones(2)])


def test_a_name_that_the_network_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigurationError, match=r"\['tail'\].*'body'.*'head'"):
        step_of(bound(modules=["tail"]))


@pytest.mark.parametrize("names", [[], "body"])
def test_modules_are_a_list_of_names(names: Any) -> None:
    with pytest.raises(ConfigurationError, match="names no module in a list"):
        Graphed(SingleDeviceStrategy(), names)


def test_a_compiler_and_graphs_exclude_each_other() -> None:
    with pytest.raises(ConfigurationError, match="reduce-overhead"):
        Graphed(SingleDeviceStrategy(), ["body"], compile=True)


def test_several_processes_and_manual_steps_are_refused() -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, address="127.0.0.1", port=1)
    strategy = bound(world=world)
    module = Net()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="world of 2"):
        strategy.train_step(StepSpec(module, [sgd], square))
    with pytest.raises(UnsupportedError, match="manual step"):
        strategy.manual_step(ManualSpec(module, [sgd], square))
