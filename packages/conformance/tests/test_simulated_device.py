"""The simulated device as torch sees it: what works, what is refused, and what is counted."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces import ConfigurationError, UnavailableError

from drivetrain_conformance import simulated

if reason := simulated.unavailable():
    pytest.skip(reason, allow_module_level=True)

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

F = nn.functional


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    # Compiling is no part of what is timed, but it is part of the first test.
    simulated.install("sim", simulated.Options(devices=2))


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with simulated.configured():
        yield
    torch.sim.set_device(0)


def during(work: Callable[[], Any], device: int | None = None) -> simulated.Counters:
    before = simulated.counters(device)
    work()
    return simulated.counters(device) - before


# A device type ------------------------------------------------------------------------------------


def test_it_is_a_device_type_of_torch_with_several_devices() -> None:
    tensor = torch.ones(3, device="sim:1")
    assert tensor.device == torch.device("sim", 1)
    assert tensor.is_sim
    assert torch.ones(2).sim().device == torch.device("sim", 0)
    assert nn.Linear(2, 2).sim(1).weight.device.index == 1
    assert torch.sim.device_count() == torch.accelerator.device_count() == 2
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert torch.sim.is_available()
    assert torch.sim.get_device_name(1) == "Simulated device 1"


def test_the_current_device_is_where_new_tensors_go() -> None:
    assert torch.tril_indices(2, 2, device="sim:1").device.index == 1
    with torch.sim.device(1):
        assert torch.sim.current_device() == 1
        assert torch.ones(1, device="sim").device.index == 1
    assert torch.ones(1, device="sim").device.index == 0
    torch.sim.set_device("sim:1")
    assert torch.ones(1, device="sim").device.index == 1
    with pytest.raises(RuntimeError, match="invalid device ordinal 2; there are 2"):
        torch.sim.set_device(2)
    with pytest.raises(RuntimeError, match="invalid device ordinal 7"):
        torch.ones(1, device="sim:7")
    with pytest.raises(ValueError, match="another device"):
        torch.sim.synchronize("cpu")


def test_the_host_does_not_see_its_memory() -> None:
    with pytest.raises(TypeError, match="can't convert sim"):
        torch.ones(1, device="sim").numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda: torch.ones(2, device="sim:0") + torch.ones(2, device="sim:1"),
        lambda: torch.ones(2, device="sim:0") + torch.ones(2),
        lambda: torch.ones(2) * torch.ones(2, device="sim:0"),
        lambda: torch.cat([torch.ones(2), torch.ones(2, device="sim")]),
        lambda: F.linear(torch.ones(1, 2, device="sim"), torch.ones(2, 2)),
        lambda: F.embedding(torch.tensor([1]), torch.ones(2, 2, device="sim")),
        lambda: F.conv2d(torch.ones(1, 1, 3, 3, device="sim"), torch.ones(1, 1, 3, 3)),
        lambda: F.cross_entropy(torch.ones(1, 3, device="sim"), torch.tensor([1])),
        lambda: torch.ones(2, device="sim").add_(torch.ones(2)),
        lambda: torch._foreach_add_([torch.ones(2, device="sim")], [torch.ones(2)]),
    ],
    ids=["add", "add-host", "host-mul", "cat", "linear", "embed", "conv", "loss", "in", "foreach"],
)
def test_devices_do_not_mix(mix: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*two devices, (sim|cpu)(:\d)? and"):
        mix()


def test_numbers_and_indices_of_the_host_are_taken_as_on_every_device() -> None:
    tensor = torch.arange(4.0, device="sim")
    assert (tensor * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert tensor[torch.tensor([3, 0])].tolist() == [3, 0]
    tensor[torch.tensor([1])] = 9.0
    assert tensor.tolist() == [0, 9, 2, 3]


def test_devices_are_copied_between_by_hand() -> None:
    there = torch.arange(3.0, device="sim:0").to("sim:1")
    assert there.device.index == 1
    assert there.tolist() == [0, 1, 2]


# What works ---------------------------------------------------------------------------------------

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding="same"), (2, 2, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, groups=2, stride=2), (2, 2, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, bias=False), (2, 2, 4, 4, 4)),
    "conv-transpose": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, output_padding=1), (2, 2, 4, 4)),
    "batch-norm": (lambda: nn.BatchNorm2d(2), (3, 2, 4, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 4)),
    "layer-norm": (lambda: nn.LayerNorm(4), (2, 4)),
    "pooling": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)),
        (2, 1, 8, 8),
    ),
    "upsample": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear")),
        (2, 1, 6, 6),
    ),
    "rnn": (lambda: nn.RNN(3, 4), (5, 2, 3)),
    "lstm": (lambda: nn.LSTM(3, 4, 2), (5, 2, 3)),
    "lstm-no-bias": (lambda: nn.LSTM(3, 4, bias=False), (5, 2, 3)),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True), (5, 2, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (5, 2, 8)),
    "activations": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.PReLU(), nn.SiLU(), nn.Softmax(1)),
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_and_their_gradients_are_what_they_are_on_the_host(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    on_host = make()
    values = []
    for module in (on_host, copy.deepcopy(on_host).to("sim:1")):
        device = next(module.parameters()).device
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        x.requires_grad_()
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.pow(2).mean().backward()
        values.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for expected, got in zip(*values, strict=True):
        assert got.device == torch.device("sim:1")
        torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.parametrize("extra", [{}, {"foreach": False}, {"fused": True}], ids=repr)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "LBFGS"])
def test_optimizers_do_what_they_do_on_the_host(name: str, extra: dict[str, bool]) -> None:
    fused = name in {"SGD", "Adam", "AdamW", "Adagrad"}
    if ("fused" in extra and not fused) or (extra and name == "LBFGS"):
        extra = {}
    torch.manual_seed(0)
    on_host = nn.Linear(4, 3)
    modules = [on_host, copy.deepcopy(on_host).to("sim")]
    for module in modules:
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.01, **extra)
        x = torch.arange(8.0).view(2, 4).to(module.weight.device)

        def closure(module: Any = module, optimizer: Any = optimizer, x: Any = x) -> Any:
            optimizer.zero_grad()
            loss = module(x).pow(2).mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    for expected, got in zip(*(m.parameters() for m in modules), strict=True):
        torch.testing.assert_close(got.cpu(), expected)


def test_views_share_memory_and_outputs_are_resized() -> None:
    tensor = torch.zeros(2, 3, device="sim")
    tensor.t()[0] = 5.0
    tensor.unfold(1, 2, 1)[1, 1] = 7.0
    tensor.view(-1)[1:2].copy_(torch.tensor([3.0]))
    assert tensor.tolist() == [[5, 3, 0], [5, 7, 7]]
    out = torch.empty(0, device="sim", dtype=torch.int64)
    assert torch.nonzero(tensor == 7, out=out) is out
    assert out.tolist() == [[1, 1], [1, 2]]
    storage = torch.arange(4.0, device="sim").untyped_storage()
    storage.resize_(8)
    assert torch.empty(0, device="sim").set_(storage).tolist() == [0, 1]


def test_numbers_of_many_kinds_come_out_right() -> None:
    x = torch.arange(6.0, device="sim").view(2, 3)
    assert x.sort(descending=True)[0].topk(1)[0].tolist() == [[2], [5]]
    assert torch.einsum("ij,kj->ik", x, x).tolist() == [[5, 14], [14, 50]]
    assert x[x > 3].tolist() == [4, 5]
    assert torch.linalg.inv(2 * torch.eye(2, device="sim")).tolist() == [[0.5, 0], [0, 0.5]]
    assert (x.to(torch.complex64) * 1j).conj().imag.tolist() == (-x).tolist()
    assert torch.func.vmap(torch.func.grad(lambda v: (v**2).sum()))(x).tolist() == (2 * x).tolist()
    assert x.bfloat16().view(torch.int16).dtype is torch.int16
    grad = torch.autograd.grad(x.requires_grad_().pow(3).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(grad.sum(), x)[0].tolist() == (6 * x).tolist()


def test_packed_sequences_and_ctc_take_lengths_from_the_host() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(5, 2, 3, device="sim"), torch.tensor([5, 3])
    )
    assert packed.batch_sizes.device.type == "cpu"
    output, _ = nn.LSTM(3, 4).to("sim")(packed)
    assert output.data.device.type == "sim"
    logits = torch.randn(5, 2, 4, device="sim").log_softmax(2)
    targets = torch.ones(2, 2, dtype=torch.int64, device="sim")
    assert F.ctc_loss(logits, targets, torch.tensor([5, 5]), torch.tensor([2, 2])).isfinite()


def test_a_module_is_saved_loaded_and_copied() -> None:
    module = nn.Linear(2, 2).to("sim:1")
    file = io.BytesIO()
    torch.save({"state": module.state_dict(), "same": module.weight}, file)
    file.seek(0)
    here = torch.load(file, weights_only=True)
    assert here["state"]["weight"].device == torch.device("sim:1")
    assert here["state"]["weight"].data_ptr() == here["same"].data_ptr()
    file.seek(0)
    on_host = torch.load(file, weights_only=True, map_location="cpu")
    assert torch.equal(on_host["state"]["weight"], module.weight.cpu())
    other = copy.deepcopy(module).to("sim:0")
    other.load_state_dict(on_host["state"])
    assert torch.equal(other.bias.cpu(), module.bias.cpu())


def test_a_loader_can_pin_its_memory() -> None:
    assert torch.ones(3).pin_memory().is_pinned()
    assert not torch.ones(3).is_pinned()
    data = TensorDataset(torch.arange(4.0))
    batches = [batch.clone() for (batch,) in DataLoader(data, 2, pin_memory=True)]
    assert torch.cat(batches).tolist() == [0, 1, 2, 3]


def test_streams_and_events_exist_and_order_nothing() -> None:
    stream = torch.Stream(device="sim:1")
    assert torch.sim.current_stream("sim:1") != stream
    with torch.sim.stream(stream):
        assert torch.sim.current_stream("sim:1") == stream
    assert torch.sim.current_stream("sim:1") != stream
    first, second = (torch.Event(device="sim", enable_timing=True) for _ in range(2))
    first.record()
    second.record()
    second.synchronize()
    assert first.query()
    assert first.elapsed_time(second) >= 0
    torch.ones(1, device="sim").record_stream(torch.sim.current_stream())


# Autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_the_rules_of_other_accelerators(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).to("sim")
    x = torch.randn(4, 1, 4, 4, device="sim")
    with torch.autocast("sim", dtype=dtype):
        y = module(x)
        assert y.dtype is dtype
        assert (y @ y.t()).dtype is dtype
        assert y.exp().dtype is torch.float32
        assert y.softmax(1).dtype is torch.float32
        assert y.sum().dtype is torch.float32
        assert torch.addcmul(x, x, x.to(dtype)).dtype is torch.float32
        assert F.cross_entropy(y, torch.zeros(4, dtype=torch.int64, device="sim")).dtype is (
            torch.float32
        )
        assert (x.double() @ x.double()).dtype is torch.float64
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(x.sigmoid(), x.sigmoid())
        y.float().sum().backward()
    assert module[0].weight.grad.dtype is torch.float32
    assert module(x).dtype is torch.float32


def test_a_loss_scaler_finds_what_is_not_finite() -> None:
    module = nn.Linear(2, 1).to("sim")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("sim", init_scale=4.0)
    before = module.weight.detach().cpu()
    for factor, scale in ((float("inf"), 2.0), (1.0, 2.0)):
        optimizer.zero_grad()
        scaler.scale(module(torch.ones(1, 2, device="sim")).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert torch.equal(module.weight.cpu(), before) == (factor != 1.0)


# Random numbers -----------------------------------------------------------------------------------


def test_every_device_has_random_numbers_of_its_own_and_the_hosts_stay() -> None:
    torch.manual_seed(3)
    host = torch.rand(4)
    torch.manual_seed(3)
    drawn = [torch.rand(2, device=device) for device in ("sim:0", "sim:0", "sim:1")]
    assert torch.cat([drawn[0], drawn[1]]).tolist() == host.tolist()
    assert drawn[2].tolist() == drawn[0].tolist()
    assert torch.rand(4).tolist() == host.tolist()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: F.dropout(torch.ones(64, device="sim"), 0.5),
        lambda: nn.Dropout2d()(torch.ones(64, 2, 1, 1, device="sim")),
        lambda: torch.empty(64, device="sim").normal_(),
        lambda: torch.randperm(64, device="sim"),
        lambda: torch.multinomial(torch.ones(64, device="sim"), 32),
        lambda: torch.bernoulli(torch.full((64,), 0.5, device="sim")),
        lambda: F.rrelu(-torch.ones(64, device="sim"), training=True),
        lambda: F.gumbel_softmax(torch.ones(64, device="sim")),
        lambda: F.scaled_dot_product_attention(
            *[torch.ones(1, 1, 8, 8, device="sim")] * 3, dropout_p=0.5
        ),
    ],
    ids=["dropout", "dropout2d", "normal", "randperm", "multinomial", "bernoulli", "rrelu",
         "gumbel", "attention"],
)  # fmt: skip
def test_what_draws_draws_from_the_device_and_can_be_repeated(draw: Callable[[], Any]) -> None:
    torch.sim.manual_seed(5)
    host, state = torch.get_rng_state(), torch.sim.get_rng_state()
    first, second = draw().cpu(), draw().cpu()
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), host)
    torch.sim.set_rng_state(state)
    assert torch.equal(draw().cpu(), first)
    with torch.random.fork_rng(devices=["sim:0"], device_type="sim"):
        draw()
    assert torch.equal(draw().cpu(), second)


def test_generators_belong_to_a_device() -> None:
    make = torch.Generator(device="sim:1").manual_seed
    assert torch.equal(
        torch.rand(2, device="sim:1", generator=make(1)).cpu(),
        torch.rand(2, generator=torch.Generator().manual_seed(1)),
    )
    with pytest.raises(RuntimeError, match="device type 'sim' but found one of 'cpu'"):
        torch.rand(2, device="sim", generator=torch.Generator())


def test_a_checkpointed_function_draws_the_same_again() -> None:
    x = torch.ones(64, device="sim", requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda v: F.dropout(v, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad.cpu(), y.detach().cpu())


# Memory -------------------------------------------------------------------------------------------

MEBI = 2**20


def test_memory_is_counted_by_device_and_freed() -> None:
    before = [simulated.memory(device)[0] for device in (0, 1)]
    held = torch.zeros(MEBI, dtype=torch.uint8, device="sim:1")
    total = held.float()  # a result of a kernel
    assert simulated.memory(1)[0] == before[1] + 5 * MEBI == torch.sim.memory_allocated(1)
    assert simulated.memory(0)[0] == before[0]
    del held, total
    allocated, peak = simulated.memory(1)
    assert allocated == before[1]
    assert peak >= before[1] + 5 * MEBI
    torch.sim.reset_peak_memory_stats(1)
    assert simulated.memory(1)[1] == before[1]


def test_too_much_memory_raises_torchs_own_error_and_nothing_is_lost() -> None:
    free = simulated.memory(0)[0]
    limit = free + 3 * MEBI
    refused = simulated.counters(0).out_of_memory
    with simulated.configured(memory_limit=limit):
        assert torch.sim.mem_get_info() == (3 * MEBI, limit)
        held = torch.zeros(2 * MEBI, dtype=torch.uint8, device="sim")
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2.00 MiB.*1.00 MiB"):
            torch.zeros(2 * MEBI, dtype=torch.uint8, device="sim")
        with pytest.raises(RuntimeError, match="out of memory"):  # which it is a kind of
            held.float()
        torch.zeros(2 * MEBI, dtype=torch.uint8, device="sim:1")  # each has its own
        assert simulated.memory(0)[0] == free + 2 * MEBI
        del held
        torch.zeros(2 * MEBI, dtype=torch.uint8, device="sim")
    assert simulated.counters(0).out_of_memory == refused + 2


# What can be switched off, and faults -------------------------------------------------------------


def test_without_fp16_there_are_no_such_tensors_and_autocast_says_so() -> None:
    with simulated.configured(fp16=False):
        for make in (
            lambda: torch.ones(1, dtype=torch.float16, device="sim"),
            lambda: torch.ones(1, device="sim").half(),
            lambda: torch.ones(1).half().to("sim"),
        ):
            with pytest.raises(RuntimeError, match=r"does not support torch\.float16"):
                make()
        with pytest.warns(UserWarning, match="bfloat16 currently"):
            torch.autocast("sim", dtype=torch.float16)
        torch.ones(1, device="sim").bfloat16()
    torch.ones(1, device="sim").half()


def test_without_inference_mode_operators_refuse_it() -> None:
    x = torch.ones(1, device="sim")
    with simulated.configured(inference_mode=False):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
            x + 1
        with torch.no_grad():
            x + 1
    with torch.inference_mode():
        assert (x + 1).item() == 2


def test_without_operators_in_place_training_works_and_they_are_refused() -> None:
    with simulated.configured(inplace=False):
        module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.ReLU()).to("sim")
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(2):
            module(torch.ones(1, 2, device="sim")).sum().backward()
            optimizer.step()
        leaf = torch.ones(2, device="sim", requires_grad=True)
        for write in (
            lambda x: x.add_(1),
            lambda x: F.relu(x, inplace=True),
            lambda x: x.mul_(x),
            lambda x: x[0].fill_(0),
            lambda x: torch.zeros(2, device="sim").add_(x),
            lambda x: torch._foreach_add_([x], 1),
        ):
            with pytest.raises(RuntimeError, match="does not support operators in place"):
                write(leaf * 1)
        with torch.no_grad():
            leaf.add_(1)
        torch.ones(2, device="sim").add_(1)


def test_a_launch_can_take_longer() -> None:
    x = torch.ones(1, device="sim")
    with simulated.configured(latency_us=20_000.0):
        start = time.perf_counter()
        x + 1
        assert time.perf_counter() - start >= 0.02


def test_a_device_fails_at_its_launch_and_stays_so_until_it_is_repaired() -> None:
    x, other = torch.ones(1, device="sim:0"), torch.ones(1, device="sim:1")
    error = getattr(torch, "AcceleratorError", RuntimeError)
    with simulated.configured(fail_at_launch=3):
        y = x + 1
        y = y + 1
        for call in (lambda: y + 1, lambda: x * 2, y.item, torch.sim.synchronize):
            with pytest.raises(error, match="device 0 failed"):
                call()
        other + 1
        simulated.configure(fail_at_launch=None)
        assert (y + 1).item() == 4


def test_a_fault_happens_to_one_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, device="sim")
    monkeypatch.setenv("RANK", "1")
    with simulated.configured(fail_at_launch=1, fault_rank=0):
        x + 1
    with (
        simulated.configured(fail_at_launch=1, fault_rank=1),
        pytest.raises(RuntimeError, match="failed"),
    ):
        x + 1


def test_options_are_put_back_and_wrong_ones_refused() -> None:
    before = simulated.current_options()
    with simulated.configured(latency_us=1.0, memory_limit=2**30):
        assert simulated.current_options().memory_limit == 2**30
    assert simulated.current_options() == before
    with pytest.raises(ConfigurationError, match="has the options"):
        simulated.configure(memory=1)
    with pytest.raises(ConfigurationError, match="are installed"):
        simulated.configure(devices=3)
    with pytest.raises(ConfigurationError, match="one name"):
        simulated.install("other")
    assert simulated.install("sim") is torch.sim


# Counters -----------------------------------------------------------------------------------------


def test_launches_are_counted_and_views_are_none() -> None:
    x = torch.ones(2, 2, device="sim:1")
    assert during(lambda: x + x).launches == 1
    assert during(lambda: (x + x).relu() @ x, device=1).launches == 3
    assert during(lambda: x + x, device=0).launches == 0
    looks = (lambda: x.t()[0].view(1, 2).expand(3, 2), lambda: x.unfold(0, 1, 1), x.detach)
    for look in looks:
        assert during(look) == simulated.Counters()


def test_copies_are_counted_with_their_bytes_and_whether_the_host_waited() -> None:
    host = torch.ones(8)
    up = during(lambda: host.to("sim"))
    assert (up.uploads, up.uploaded_bytes, up.blocking_uploads, up.synchronizations) == (
        1,
        32,
        1,
        0,
    )
    assert during(lambda: host.to("sim", non_blocking=True)).blocking_uploads == 0
    x = host.to("sim")
    down = during(x.cpu)
    assert (down.downloads, down.downloaded_bytes, down.synchronizations) == (1, 32, 1)
    assert during(lambda: x.to("cpu", non_blocking=True)).synchronizations == 0
    assert during(lambda: x.to("sim:1")).device_copies == 1
    assert during(x.clone).device_copies == 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        repr,
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.sim.synchronize(),
        lambda x: torch.accelerator.synchronize(),
        lambda x: torch.sim.current_stream().synchronize(),
    ],
)
def test_whatever_makes_the_host_wait_is_counted(wait: Callable[[Any], object]) -> None:
    x = torch.arange(4.0, device="sim")
    assert during(lambda: wait(x)).synchronizations >= 1


def test_a_training_step_that_reads_nothing_makes_the_host_wait_for_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1)).to("sim")
    optimizer = torch.optim.AdamW(module.parameters())
    x = torch.ones(2, 4, device="sim")

    def step() -> None:
        loss = F.mse_loss(module(x), x[:, :1])
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    counted = during(step)
    assert counted.synchronizations == counted.downloads == counted.uploads == 0
    assert counted.launches > 20
    assert during(step).launches == counted.launches
    assert during(lambda: x[torch.tensor([0, 1], device="sim")]).synchronizations == 0


# What does not work, and says so ------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing",
    [
        lambda: torch.eye(2, device="sim").to_sparse(),
        lambda: torch.empty(2, 2, device="sim", layout=torch.sparse_coo),
    ],
)
def test_what_it_lacks_is_not_implemented(missing: Callable[[], object]) -> None:
    with pytest.raises(NotImplementedError, match=r"dense tensors only|Sparsesim"):
        missing()


# In processes of their own ------------------------------------------------------------------------


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_can_have_another_name_and_its_options_from_the_environment() -> None:
    code = (
        "import torch; from drivetrain_conformance import simulated\n"
        "simulated.install('acme')\n"
        "print(torch.ones(2, device='acme:3').sum().item(), torch.acme.device_count(),"
        " simulated.installed(), simulated.current_options().fp16)"
    )
    given = simulated.Options(devices=4, fp16=False).to_environment()
    assert run(code, **given) == "2.0 4 acme False"


def test_loading_what_was_compiled_takes_less_than_a_second() -> None:
    code = (
        "import time, torch; from drivetrain_conformance import simulated\n"
        "start = time.perf_counter(); simulated.install(); print(time.perf_counter() - start)"
    )
    assert float(run(code)) < 1.0


def test_a_place_that_another_package_has_taken_is_said() -> None:
    code = (
        "import torch; from drivetrain_conformance import simulated\n"
        "torch.utils.rename_privateuse1_backend('npu')\n"
        "try: simulated.install()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = run(code)
    assert said.startswith(UnavailableError.__name__)
    assert "'npu'" in said


def test_nothing_is_known_before_it_is_installed() -> None:
    code = (
        "from drivetrain_conformance import simulated\n"
        "assert simulated.installed() is None\n"
        "try: simulated.counters()\n"
        "except Exception as error: print(error)"
    )
    assert "Call install() first." in run(code)


def test_a_process_that_was_forked_has_a_copy() -> None:
    code = (
        "import os, torch; from drivetrain_conformance import simulated\n"
        "simulated.install(); x = torch.ones(2, device='sim')\n"
        "if not os.fork(): x.add_(1); print(x.tolist(), flush=True); os._exit(0)\n"
        "os.wait(); print(x.tolist())"
    )
    assert run(code).splitlines() == ["[2.0, 2.0]", "[1.0, 1.0]"]
