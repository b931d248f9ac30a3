"""On a real device. Skipped without one; nobody has seen these pass yet (see docs/verified.md)."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import (
    Clip,
    StepSpec,
    StrategyContext,
    SupportsStreams,
    UnavailableError,
    UnsupportedError,
    World,
)
from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.memory import DeviceMemoryError
from drivetrain_toolkit.strategies import SingleDeviceStrategy
from drivetrain_toolkit.tuned import Tuned
from torch import Tensor, nn

from drivetrain_cuda import spec
from drivetrain_cuda.accelerator import CudaAccelerator
from drivetrain_cuda.backend import CudaBackend
from drivetrain_cuda.graphs import Graphed
from drivetrain_cuda.precision import HAS_FLOAT8

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

if not torch.cuda.is_available():
    pytest.skip(f"needs a CUDA device: {spec.probe().reason}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def accelerator() -> Iterator[CudaAccelerator]:
    made = CudaAccelerator()
    made.activate(0, 1)
    yield made
    made.close()


def bound(strategy: Any, precision: str = "32-true", accelerator: Any = None) -> Any:
    backend = CudaBackend()
    return strategy(
        StrategyContext(
            accelerator or backend.accelerator(),
            0,
            World(),
            backend.collectives(World()),
            backend.precision(precision),
        )
    )


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16))


def square(module: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = module(batch).float().square().mean()
    return out


def batches(count: int = 8) -> list[Tensor]:
    """The same batch, so that its loss falls."""
    return [torch.randn(32, 64, generator=torch.Generator().manual_seed(4))] * count


def losses(strategy: Any, precision: str = "32-true", clip: Clip | None = None) -> list[float]:
    ready = bound(strategy, precision)
    module = ready.prepare(net())
    # The epsilon of AdamW is zero in float16.
    kind: Any = torch.optim.SGD if precision == "16-true" else torch.optim.AdamW
    optimizer = kind(module.parameters(), lr=1e-2)
    step = ready.train_step(StepSpec(module, [optimizer], square, clip=clip))
    with step:
        found = [step([ready.feed(batch)]).loss for batch in batches()]
    result = [float(loss) for loss in found]
    ready.close()
    return result


def test_the_probe_counts_what_torch_counts_and_makes_no_context() -> None:
    """In a process that has none yet."""
    code = (
        "from drivetrain_cuda import spec; found = spec.probe()\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
        "assert found.devices == torch.cuda.device_count(), found\n"
        "print('same')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.stdout.strip() == "same", done.stderr


def test_uuids_of_the_probe_are_those_of_torch() -> None:
    for index, name in enumerate(spec.probe().names):
        uuid = name.rpartition(" ")[2]
        if uuid.startswith("GPU-"):
            assert uuid == f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def test_activating_makes_it_current_and_closing_sets_it_back() -> None:
    before = torch.cuda.current_device()
    last = torch.cuda.device_count() - 1
    made = CudaAccelerator()
    assert made.activate(last, 1) == torch.device("cuda", last)
    assert torch.zeros(1, device="cuda").device.index == last
    made.close()
    assert torch.cuda.current_device() == before


def test_a_device_that_is_not_there_is_refused_with_what_is() -> None:
    there = torch.cuda.device_count()
    with pytest.raises(UnavailableError, match=f"device {there + 3}.*sees {there}"):
        CudaAccelerator().activate(there + 3, 1)


def test_tf32_changes_what_a_product_rounds_to() -> None:
    """Or is refused, on a device without it."""
    capability = torch.cuda.get_device_capability(0)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = (x.double() @ x.double()).float()

    def error(tf32: bool) -> float:
        made = CudaAccelerator(tf32=tf32)
        made.activate(0, 1)
        found = float((x @ x - exact).abs().max())
        made.close()
        return found

    if capability < (8, 0):
        with pytest.raises(UnsupportedError, match=r"TF32 came with 8\.0"):
            error(tf32=True)
    else:
        assert error(tf32=True) > 10 * error(tf32=False)


def test_memory_and_random_numbers(accelerator: CudaAccelerator) -> None:
    before = accelerator.memory_stats(DEVICE)["allocated"]
    held = torch.ones(2**20, device=DEVICE)
    stats = accelerator.memory_stats(DEVICE)
    assert stats["allocated"] - before >= held.nbytes
    assert stats["total"] > stats["reserved"] >= stats["allocated"]
    state = accelerator.rng_state(DEVICE)
    first = torch.rand(8, device=DEVICE)
    accelerator.set_rng_state(state, DEVICE)
    assert torch.equal(torch.rand(8, device=DEVICE), first)


@pytest.mark.parametrize("name", sorted(spec.capabilities.precisions - {"fp8"}))
def test_every_precision_trains(name: str) -> None:
    found = losses(SingleDeviceStrategy(), name, None if name == "16-true" else Clip(1.0))
    assert found[-1] < found[0]


def test_float8_trains_or_is_refused_by_name() -> None:
    if torch.cuda.get_device_capability(0) < HAS_FLOAT8:
        with pytest.raises(UnsupportedError, match=r"'fp8' was asked for.*float8 came with"):
            losses(SingleDeviceStrategy(), "fp8")
        return
    pytest.importorskip("torchao", reason="torchao is not installed")
    found = losses(SingleDeviceStrategy(), "fp8")
    assert found[-1] < found[0]


def test_copies_on_their_own_stream_arrive_before_the_work() -> None:
    """With work in the queue that is longer than the copy."""
    accelerator = CudaAccelerator()
    assert isinstance(accelerator, SupportsStreams)
    ready = bound(Tuned(SingleDeviceStrategy()), accelerator=accelerator)
    slow = torch.randn(2048, 2048, device=DEVICE)
    for number in range(50):
        batch = torch.full((256, 1024), float(number))
        slow = (slow @ slow).clamp(-1, 1)
        fed = ready.feed((batch, batch + 1))
        assert torch.equal(fed[0] + 1, fed[1])
        assert float(fed[0][0, 0]) == number
    ready.close()


def test_fused_optimizers_update_as_others_do() -> None:
    assert losses(Tuned(SingleDeviceStrategy(), fused=True)) == pytest.approx(
        losses(SingleDeviceStrategy()), rel=1e-3
    )


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, of its own parts
def test_a_compiled_step_trains_as_one_that_is_not() -> None:
    pytest.importorskip("triton", reason="torch's compiler needs triton here")
    compiled = losses(Tuned(SingleDeviceStrategy(), compile=CompileOptions()), "bf16-mixed")
    assert compiled == pytest.approx(losses(SingleDeviceStrategy(), "bf16-mixed"), rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_modules_as_graphs_train_as_modules(precision: str) -> None:
    graphs = losses(Graphed(SingleDeviceStrategy(), ["0", "2"]), precision, Clip(1.0))
    plain = losses(SingleDeviceStrategy(), precision, Clip(1.0))
    assert graphs == pytest.approx(plain, rel=0.05)


def test_memory_that_runs_out_is_accounted_for() -> None:
    """Within a small part of the device, so that nobody else is disturbed."""
    total = torch.cuda.get_device_properties(0).total_memory
    accelerator = CudaAccelerator(memory_fraction=min(1.0, 2 * 2**30 / total))
    ready = bound(Tuned(SingleDeviceStrategy()), accelerator=accelerator)
    module = ready.prepare(nn.Linear(1024, 1024))
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    step = ready.train_step(StepSpec(module, [sgd], square))
    try:
        with pytest.raises(DeviceMemoryError, match=r"cuda:0 ran out of memory") as caught:
            step([ready.feed(torch.ones(2**18, 1024))])
        assert "parameter weight (1024×1024, float32)" in str(caught.value)
    finally:
        del step
        ready.close()
        torch.cuda.empty_cache()


def test_forking_after_using_a_device_is_refused() -> None:
    from drivetrain_interfaces import ClusterError, LaunchRequest

    torch.zeros(1, device=DEVICE)
    launcher = CudaBackend().launcher("fork")
    assert launcher is not None
    with pytest.raises(ClusterError, match="used a GPU already"):
        launcher.plan(LaunchRequest(local_size=1))


RANK = """
import sys
import torch
from drivetrain_interfaces import ReduceOp, StepSpec, StrategyContext, World
from drivetrain_cuda.backend import CudaBackend

rank, size, port = map(int, sys.argv[1:])
world = World(
    rank=rank, size=size, local_rank=rank, local_size=size, address="127.0.0.1", port=port
)
backend = CudaBackend()
accelerator = backend.accelerator()
device = accelerator.activate(rank, size)
collectives = backend.collectives(world)
context = StrategyContext(accelerator, rank, world, collectives, backend.precision("32-true"))
strategy = backend.strategy("ddp", context)
torch.manual_seed(rank)
module = strategy.prepare(torch.nn.Linear(8, 1))
sgd = torch.optim.SGD(module.parameters(), lr=0.1)
step = strategy.train_step(StepSpec(module, [sgd], lambda m, x: m(x).square().mean()))
for number in range(4):
    step([strategy.feed(torch.full((4, 8), float(rank + number)))])
mine = module.weight.detach()
assert torch.equal(collectives.all_reduce(mine, ReduceOp.MAX), mine), "ranks differ"
assert torch.equal(collectives.all_reduce(mine, ReduceOp.MIN), mine), "ranks differ"
print("equal")
collectives.close()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("library", ["nccl", "gloo"])
def test_two_devices_train_one_model(tmp_path: Path, library: str) -> None:
    import os
    import socket

    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "DRIVETRAIN_CUDA_COLLECTIVES": library}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        ends = [rank.communicate(timeout=110) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for out, error in ends:
        assert out.strip() == "equal", error
