"""Copies beside the work and words about memory, on the simulated device. Needs its own process."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from drivetrain_interfaces import StepSpec, StrategyContext, SupportsStreams, World
from torch import nn

from drivetrain_conformance import simulated

if reason := simulated.unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("drivetrain_toolkit", reason="what is tested is in the toolkit")

from drivetrain_toolkit import strategies
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.feeding import SideStreamFeed
from drivetrain_toolkit.memory import DeviceMemoryError
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.strategies import SingleDeviceStrategy
from drivetrain_toolkit.tuned import Tuned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import DeviceFacts

    from drivetrain_conformance.simulated import Counters

HOME = "sim:0"


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    simulated.install("sim", simulated.Options(devices=2))


class Streaming:
    """An accelerator of simulated devices with a stream for copies."""

    device_type = "sim"
    facts: DeviceFacts

    def __init__(self) -> None:
        self.streams: list[torch.Stream] = []

    def device_count(self) -> int:
        return 2

    def activate(self, index: int, local_size: int) -> torch.device:
        return torch.device("sim", index)

    def synchronize(self, device: torch.device) -> None:
        torch.accelerator.synchronize(device)

    def close(self) -> None:
        pass

    def copy_stream(self, device: torch.device) -> torch.Stream:
        if not self.streams:
            self.streams.append(torch.Stream(device))
        return self.streams[0]

    def memory_stats(self, device: torch.device) -> Mapping[str, float]:
        allocated, peak = simulated.memory(device.index or 0)
        return {"allocated": float(allocated), "peak": float(peak)}


@dataclass
class Record:
    value: torch.Tensor
    note: str = "kept"


class Own:
    """Knows itself how it is moved, and on which stream that was."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value
        self.stream: Any = None

    def to(self, device: torch.device) -> Own:
        moved = Own(self.value.to(device))
        moved.stream = torch.accelerator.current_stream(device)
        return moved


def context_of(accelerator: Streaming) -> StrategyContext:
    return StrategyContext(
        accelerator,
        0,
        World(),
        LocalCollectives(),
        make_precision("32-true", "sim"),
        devices=(0, 1),
    )


def bound(**options: Any) -> Any:
    return Tuned(SingleDeviceStrategy(), **options)(context_of(Streaming()))


def test_an_accelerator_with_a_stream_for_copies_has_that_ability() -> None:
    """A13"""
    accelerator = Streaming()
    assert isinstance(accelerator, SupportsStreams)
    device = torch.device(HOME)
    stream = accelerator.copy_stream(device)
    assert stream == accelerator.copy_stream(device) != torch.accelerator.current_stream(device)


@pytest.mark.parametrize(
    "kind", ["SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "DataParallelStrategy"]
)
def test_strategies_copy_beside_the_work_of_their_own_accord(kind: str) -> None:
    accelerator = Streaming()
    accelerator.facts = cast("DeviceFacts", SimpleNamespace(eager=True))
    strategy = getattr(strategies, kind)()(context_of(accelerator))
    assert len(accelerator.streams) == 1
    batch = (torch.ones(3),)
    strategy.feed(batch)
    before = simulated.counters()
    fed = strategy.feed(batch)
    delta: Counters = simulated.counters() - before
    assert fed[0].device == torch.device(HOME)
    assert (delta.uploads, delta.blocking_uploads, delta.synchronizations) == (1, 0, 0)


def test_copies_may_stay_among_the_work() -> None:
    plain = SingleDeviceStrategy()
    plain.prefetch = False
    for asked in (plain, Tuned(SingleDeviceStrategy(), prefetch=False)):
        accelerator = Streaming()
        fed = asked(context_of(accelerator)).feed((torch.ones(3),))
        assert fed[0].device == torch.device(HOME)
        assert accelerator.streams == []


def test_batches_of_all_kinds_arrive_whole() -> None:
    feed = bound().feed
    value = torch.arange(6.0)
    fed = feed(OrderedDict(a=(value, [value + 1]), b=Record(value), c="text", d=None, e=2.5))
    assert type(fed) is OrderedDict
    assert fed["a"][0].device == fed["b"].value.device == torch.device(HOME)
    assert torch.equal(fed["a"][1][0].cpu(), value + 1)
    assert (fed["b"].note, fed["c"], fed["d"], fed["e"]) == ("kept", "text", None, 2.5)


def test_the_callers_batch_stays_and_what_is_there_is_not_copied() -> None:
    feed = bound().feed
    batch = [torch.ones(2), torch.ones(2, device=HOME)]
    fed = feed(batch)
    assert batch[0].device.type == "cpu"
    assert fed[1] is batch[1]
    assert feed(fed) is fed


def test_the_host_does_not_wait_for_a_copy() -> None:
    """A copy from memory that is not pinned would make it wait."""
    feed = bound().feed
    batch = (torch.ones(64, 8), torch.ones(64))
    feed(batch)
    before = simulated.counters()
    fed = feed(batch)
    delta: Counters = simulated.counters() - before
    assert delta.synchronizations == 0
    assert delta.blocking_uploads == 0
    assert delta.uploads == len(batch)
    assert torch.equal(fed[0].cpu(), batch[0])


def test_copies_are_made_on_the_stream_for_copies_and_the_work_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = Streaming()
    device = torch.device(HOME)
    feed = SideStreamFeed(accelerator, device)
    work = torch.accelerator.current_stream(device)
    order: list[Any] = []
    real = torch.accelerator.set_stream
    monkeypatch.setattr(
        torch.accelerator, "set_stream", lambda stream: (order.append(stream), real(stream))
    )
    feed((torch.ones(3),))
    assert order == [accelerator.streams[0], work]
    assert torch.accelerator.current_stream(device) == work


def test_the_stream_of_the_work_is_current_again_after_an_error() -> None:
    feed = SideStreamFeed(Streaming(), torch.device(HOME))
    work = torch.accelerator.current_stream(torch.device(HOME))
    with (
        simulated.configured(memory_limit=simulated.memory(0)[0] + 100),
        pytest.raises(torch.OutOfMemoryError),
    ):
        feed((torch.ones(10_000),))
    assert torch.accelerator.current_stream(torch.device(HOME)) == work


def test_an_object_that_moves_itself_does_so_among_the_work() -> None:
    work = torch.accelerator.current_stream(torch.device(HOME))
    fed = bound().feed((torch.ones(2), Own(torch.ones(2))))
    assert fed[1].value.device == torch.device(HOME)
    assert fed[1].stream == work


def mean_square(module: nn.Module, batch: Any) -> torch.Tensor:
    value: torch.Tensor = module(batch[0]).square().mean()
    return value


def test_memory_that_runs_out_in_a_step_is_accounted_for() -> None:
    strategy = bound()
    module = strategy.prepare(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1)))
    adam = torch.optim.Adam(module.parameters())
    step = strategy.train_step(StepSpec(module, [adam], mean_square))
    small = strategy.feed((torch.ones(2, 100),))
    step([small])
    large = strategy.feed((torch.ones(2000, 100),))
    with (
        simulated.configured(memory_limit=simulated.memory(0)[0] + 50_000),
        pytest.raises(DeviceMemoryError) as caught,
    ):
        step([large])
    text = str(caught.value)
    assert text.startswith("sim:0 ran out of memory in a train step: ")
    assert "Tried to allocate" in text
    for part in ("parameter 39.85 KiB", "optimizer state", "batch 781.25 KiB", "gradients"):
        assert part in text
    assert "781.25 KiB: batch a tensor (2000×100, float32)" in text
    assert "39.06 KiB: parameter 0.weight (100×100, float32)" in text
    assert "39.06 KiB: optimizer state exp_avg of 0.weight (100×100, float32)" in text
    assert step([small]).applied, "and training can go on with less"


def test_a_module_that_is_too_large_is_accounted_for() -> None:
    strategy = bound()
    with (
        simulated.configured(memory_limit=simulated.memory(0)[0] + 50_000),
        pytest.raises(DeviceMemoryError, match="in moving the module there"),
    ):
        strategy.prepare(nn.Linear(1000, 1000))


def test_a_batch_that_is_too_large_is_told() -> None:
    strategy = bound()
    with (
        simulated.configured(memory_limit=simulated.memory(0)[0] + 50_000),
        pytest.raises(DeviceMemoryError, match="in moving a batch there"),
    ):
        strategy.feed((torch.ones(100_000),))
