"""Four virtual devices in one process; run in a process of its own, since SPMD cannot be undone."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from drivetrain_interfaces import ConfigurationError, UnsupportedError, World
from torch import nn

from drivetrain_xla.compilations import compilations
from drivetrain_xla.sharding import make_layout

KINDS = {
    "data": ("spmd", {}),
    "tensor": ("spmd", {"mesh": {"data": -1, "model": 2}, "plan": {"2.weight": (None, "model")}}),
    "fsdp": ("fsdp", {}),
    "fsdp and tensor": (
        "fsdp",
        {"mesh": {"fsdp": 2, "model": 2}, "plan": {"?.weight": ("model", None)}},
    ),
    "layers": ("fsdp", {"wrap": (nn.Linear,), "checkpoint": (nn.Tanh,)}),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def sharding(tensor):
    return torch_xla._XLAC._get_xla_sharding_spec(tensor)


def bind(lab, kind, precision="32-true"):
    name, options = KINDS[kind]
    return lab.bind(name, precision, **options)


def test_there_are_four_devices():
    assert xr.is_spmd()
    assert xr.global_runtime_device_count() == 4


@EACH
def test_training_is_that_of_one_device(lab, by_hand, kind):
    """The batch of six goes to every device whole, since four do not divide it."""
    batches = [*lab.batches(4), *lab.batches(2, rows=6), *lab.batches(4, seed=1)]
    losses, module = lab.train(bind(lab, kind), batches)
    wanted, reference = by_hand(lab.model(), batches)
    assert losses == pytest.approx(wanted, abs=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name].cpu(), value, atol=1e-5, rtol=1e-4)


@EACH
def test_a_run_compiles_twice_and_reads_nothing_back(lab, kind):
    strategy = bind(lab, kind)
    width = 16 + 8 * list(KINDS).index(kind)  # graphs that no other test has compiled
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    _, _, step = lab.build(strategy, model=model)
    batches = [strategy.feed(batch) for batch in lab.batches(8)]
    met.clear_all()
    with step:
        for batch in batches:
            step([batch])
    assert compilations() == 2
    assert met.metric_data("TransferFromDeviceTime") is None


def test_parameters_and_moments_are_divided(lab):
    strategy = bind(lab, "fsdp")
    module, (optimizer,), step = lab.build(strategy)
    with step:
        for batch in lab.batches(2):
            step([strategy.feed(batch)])
    weight = module[0].weight
    assert sharding(weight) == "{devices=[4,1]0,1,2,3}"
    assert sharding(optimizer.state[weight]["exp_avg"]) == sharding(weight)
    assert sharding(strategy.feed(lab.batches(1)[0])[0]) == "{devices=[4,1]0,1,2,3}"


def test_bf16_is_close(lab, by_hand):
    batches = lab.batches(6)
    losses, _ = lab.train(bind(lab, "fsdp", "bf16-mixed"), batches)
    assert losses == pytest.approx(by_hand(lab.model(), batches)[0], abs=3e-2)


@EACH
def test_a_state_goes_on_in_any_other_layout(lab, kind):
    """Saved in one layout and loaded in each, also on one device and on the CPU: exact."""
    batches = lab.batches(6)
    strategy = bind(lab, kind)
    _, _, step = lab.build(strategy)
    with step:
        for batch in batches[:3]:
            step([strategy.feed(batch)])
        state = strategy.state()
        ends = [float(step([strategy.feed(batch)]).loss) for batch in batches[3:]]
    for other in KINDS:
        again = bind(lab, other)
        _, _, step = lab.build(again)
        again.load(state)
        loaded = again.state()
        assert all(torch.equal(loaded.module[key], value) for key, value in state.module.items())
        for key, kept in state.optimizers[0]["state"].items():
            mine = loaded.optimizers[0]["state"][key]
            assert all(torch.equal(mine[name], value) for name, value in kept.items())
        with step:
            found = [float(step([again.feed(batch)]).loss) for batch in batches[3:]]
        assert found == pytest.approx(ends, abs=1e-6)
        again.close()
    twin = lab.model()
    twin.load_state_dict(state.module)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp and tensor"])
def test_a_state_is_read_and_given_part_by_part(lab, kind):
    """Nothing is made whole on a device, and none is sent what another holds."""
    strategy = bind(lab, kind)
    module, (optimizer,), step = lab.build(strategy)
    first, *others = [strategy.feed(batch) for batch in lab.batches(3)]
    with step:
        step([first])
        strategy.load(strategy.state())  # what is compiled for it is compiled here
        for batch in others:
            step([batch])
    torch_xla.sync()
    met.clear_all()
    state = strategy.state()
    read = met.metric_data("InboundData")[1]
    made_whole = met.counter_value("ReplicateShardedData") or 0
    assert met.metric_data("CompileTime") is None
    kept = [value for each in optimizer.state.values() for value in each.values()]
    held = [value for value in (*module.parameters(), *kept) if value.device.type == "xla"]
    assert read == sum(bytes_read(value) for value in held)
    assert made_whole <= sum(parts(value) == 1 for value in held), "of those that were whole"
    met.clear_all()
    strategy.load(state)
    sent = met.metric_data("OutboundData")[1]
    assert sent == sum(bytes_sent(value) for value in held)


def parts(value):
    """How many different parts a tensor is divided into."""
    axes = sharding(value).removeprefix("{devices=[").partition("]")[0]
    if axes in {"", "{replicated}"}:
        return 1
    return math.prod(int(each) for each in axes.split(",")[: value.dim()])


def bytes_read(value):
    """All devices are asked for their part, and one if all hold the same."""
    return value.nbytes if parts(value) == 1 else bytes_sent(value)


def bytes_sent(value):
    """Each device is sent its part; what is not divided goes to all."""
    return value.nbytes * 4 // parts(value)


def test_after_a_load_parameters_are_divided_again(lab):
    strategy = bind(lab, "fsdp")
    module, (optimizer,), step = lab.build(strategy)
    with step:
        step([strategy.feed(lab.batches(1)[0])])
    strategy.load(strategy.state())
    weight = module[0].weight
    assert sharding(weight) == "{devices=[4,1]0,1,2,3}"
    assert sharding(optimizer.state[weight]["exp_avg"]) == sharding(weight)


def test_closing_leaves_the_module_as_it_was(lab):
    strategy = bind(lab, "layers")
    module, _, _ = lab.build(strategy)
    assert "forward" in vars(module[1])
    strategy.close()
    assert "forward" not in vars(module[1])
    assert not module[0]._forward_hooks


def test_a_checkpointed_module_draws_the_same_dropout_again(lab):
    class Block(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    def run(**options):
        model = nn.Sequential(nn.Linear(4, 16), Block(), nn.Linear(16, 2))
        model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
        torch.manual_seed(1)
        _, module = lab.train(lab.bind("spmd", **options), lab.batches(1), model=model)
        return module.state_dict()

    plain, again = run(), run(checkpoint=(Block,))
    assert all(torch.equal(again[name].cpu(), value.cpu()) for name, value in plain.items())


def test_a_part_of_the_devices_is_refused(lab):
    with pytest.raises(UnsupportedError, match=r"devices=\[0, 1\].* all 4"):
        lab.backend.strategy("spmd", replace(lab.context(), devices=(0, 1)))


def test_several_processes_are_refused(lab):
    world = World(0, 2, 0, 2, address="127.0.0.1", port=1)
    with pytest.raises(UnsupportedError, match="2 processes"):
        lab.backend.strategy("fsdp", replace(lab.context(), world=world))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("spmd", {"mesh": {"data": 3}}, "4 devices"),
        ("spmd", {"mesh": {"data": -1, "model": 3}}, "4 devices"),
        ("spmd", {"mesh": {"data": -1, "model": -1}}, "4 devices"),
        ("spmd", {"mesh": {"data": 0, "model": 4}}, "4 devices"),
        ("fsdp", {"mesh": {"data": 4}}, "no axis 'fsdp'"),
        ("spmd", {"nets": 1}, "nets"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(lab, name, options, told):
    with pytest.raises(ConfigurationError, match=told):
        lab.bind(name, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"plan": {"0.wieght": ("data", None)}}, "0.wieght"),
        ({"plan": {"0.weight": ("data",)}}, r"\(8, 4\)"),
        ({"plan": {"2.weight": ("data", None)}}, r"\(2, 8\)"),
        ({"plan": {"0.weight": ("model", None)}}, "model"),
        ({"wrap": (nn.Conv2d,)}, "Conv2d"),
    ],
)
def test_a_plan_that_does_not_fit_the_module_is_refused(lab, options, told):
    strategy = lab.bind("spmd", **options)
    with pytest.raises(ConfigurationError, match=told):
        strategy.prepare(lab.model())


def test_the_largest_dimension_that_can_be_divided_is():
    layout = make_layout(None, None, 4, sharded=True)
    parts = layout.of_parameters(nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 3), nn.Linear(3, 8)))
    assert parts["0.weight"] == (None, "fsdp")
    assert parts["1.weight"] == (None, None)
    assert parts["2.weight"] == ("fsdp", None)
    assert parts["2.bias"] == ("fsdp",)


def test_devices_that_were_used_one_by_one_are_told():
    code = (
        "from drivetrain_interfaces import UnsupportedError\n"
        "from drivetrain_xla.runtime import open_runtime\n"
        "open_runtime()\n"
        "try:\n    open_runtime(spmd=True)\nexcept UnsupportedError as error:\n    print(error)"
    )
    env = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=90,
        env=env,
        check=True,
    )
    assert "one by one before" in done.stdout
