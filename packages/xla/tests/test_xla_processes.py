"""Real processes on torch_xla's CPU runtime, each with a device of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch_xla
from drivetrain_interfaces import (
    ClusterError,
    LaunchRequest,
    StepSpec,
    UnsupportedError,
    UserCodeError,
    World,
)
from drivetrain_toolkit.collectives import LocalCollectives
from torch import nn

from drivetrain_xla import monitor
from drivetrain_xla.launcher import XlaLauncher
from drivetrain_xla.replicas import average_in_graph
from drivetrain_xla.seeds import TPUSpawnPlugin
from drivetrain_xla.zero1 import dealt_out

#: Each process takes seconds to import torch_xla, on a machine that may be busy.
pytestmark = pytest.mark.timeout(400)

#: ``torch_xla.launch`` starts one process on CPUs; it is told here that there are two chips.
LAUNCH = """
import json, os, sys
from drivetrain_interfaces import DrivetrainError, LaunchRequest
from drivetrain_toolkit.launchers import plans

import torch
from torch import nn

from drivetrain_interfaces import StepSpec, StrategyContext
from drivetrain_xla.backend import XlaBackend
from drivetrain_xla.launcher import XlaLauncher


def loss(module, batch):
    return (module(batch[0]) - batch[1]).square().mean()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator))
        for _ in range(4)
    ]


def train(world, name="ddp"):
    backend = XlaBackend()
    accelerator = backend.accelerator()
    precision = backend.precision("32-true")
    strategy = backend.strategy(
        name, StrategyContext(accelerator, 0, world, backend.collectives(world), precision)
    )
    torch.manual_seed(world.rank)
    if world.is_main:
        torch.manual_seed(0)
    module = strategy.prepare(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    step = strategy.train_step(StepSpec(module, [optimizer], loss))
    half = slice(world.rank * 4, world.rank * 4 + 4) if world.size == 2 else slice(None)
    with step:
        for x, y in batches():
            step([strategy.feed((x[half], y[half]))])
    state = strategy.state()
    return {
        "place": [world.rank, world.size, os.environ["RANK"]],
        "module": {key: value.tolist() for key, value in state.module.items()},
        "pid": os.getpid(),
    }


def broken(world):
    if world.rank == 1:
        raise ValueError("rank one breaks")
    import time
    time.sleep(600)


if __name__ == "__main__":
    from torch_xla._internal import pjrt
    from torch_xla.experimental import plugins

    pjrt._merge_replica_results = dict  # both have ordinal 0, since neither runtime knows the other

    class Two:
        def physical_chip_count(self):
            return 2

    plugins.using_dynamic_plugins = lambda: True
    plugins.default = Two
    request = LaunchRequest(local_size=2)
    launcher = XlaLauncher()
    found = {}
    for name, main in (("train", train), ("broken", broken)):
        plan = plans.make_plan(request, launcher.name, reservation=plans.reserve(request))
        try:
            found[name] = launcher.launch(main, plan)
        except DrivetrainError as error:
            found[name] = [type(error).__name__, str(error)]
    found["here"] = os.getpid()
    print("ANSWER", json.dumps(found))
"""

#: The same module trained by ranks on two backends.
FIT = """
import json, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from drivetrain import Module, Trainer, seed_everything


class Classifier(Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(accelerator, strategy, folder):
    seed_everything(7)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator)
    data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
    trainer = Trainer(
        accelerator=accelerator, devices=2, strategy=strategy, launcher="spawn", max_epochs=2,
        enable_progress_bar=False, default_root_dir=folder + "/" + accelerator + strategy,
    )
    module = Classifier()
    trainer.fit(module, DataLoader(data, 16, shuffle=True))
    assert trainer.plan.world_size == 2
    return {key: value.tolist() for key, value in module.state_dict().items()}


if __name__ == "__main__":
    runs = [("xla", "ddp"), ("xla", "zero1"), ("cpu", "ddp")]
    print("ANSWER", json.dumps([fit(*run, sys.argv[1]) for run in runs]))
"""


def answer(tmp_path, code, *arguments, **env):
    path = tmp_path / "script.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1", **env},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("ANSWER "))


def test_torch_xla_launches_ranks_that_train_as_one(tmp_path, lab, by_hand):
    found = answer(tmp_path, LAUNCH, CPU_NUM_DEVICES="1")
    trained = found["train"]
    assert trained["place"] == [0, 2, "0"], trained
    assert trained["pid"] != found["here"]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator))
        for _ in range(4)
    ]
    _, alone = by_hand(lab.model(), batches)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(torch.tensor(trained["module"][name]), value, atol=1e-5, rtol=0)
    kind, text = found["broken"]
    assert kind == "ProcessFailedError"
    assert "rank one breaks" in text


def test_ranks_of_a_trainer_train_as_on_the_cpu(tmp_path):
    ddp, zero1, cpu = answer(tmp_path, FIT, str(tmp_path), CPU_NUM_DEVICES="2")
    for name, value in cpu.items():
        for found in (ddp, zero1):
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(value), atol=2e-5, rtol=1e-4
            )


def test_the_launcher_plans_no_more_than_torch_xla_starts():
    launcher = XlaLauncher()
    assert [world.size for world in launcher.plan(LaunchRequest()).worlds] == [1]
    with pytest.raises(ClusterError, match=r"2 processes.*one on each of 1 devices"):
        launcher.plan(LaunchRequest(local_size=2))


def test_a_process_that_has_opened_the_devices_launches_no_others():
    launcher = XlaLauncher()
    with pytest.raises(ClusterError, match="opened"):
        launcher.launch(print, launcher.plan(LaunchRequest()))


def test_averaging_in_the_graph_is_a_part_of_it(lab):
    """In a world of one, which is all that the CPU runtime has: a graph more would be a sync."""
    module = nn.Linear(4, 2).to("xla")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    average = average_in_graph([optimizer], LocalCollectives(), 1)
    module(torch.ones(3, 4, device="xla")).sum().backward()
    torch_xla.sync()
    before = monitor.counts()
    average()
    torch_xla.sync()
    found = monitor.counts() - before
    assert (found.syncs, found.read_back) == (1, 0)
    assert module.weight.grad.cpu().tolist() == [[3.0] * 4] * 2


def test_gradients_that_appear_later_are_refused():
    module = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]).to("xla")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    average = average_in_graph([optimizer], LocalCollectives(), 1)
    module[0](torch.ones(3, 4, device="xla")).sum().backward()
    average()
    assert module[1].weight.grad is None
    module[1](torch.ones(3, 4, device="xla")).sum().backward()
    with pytest.raises(UserCodeError, match="4 parameters have gradients"):
        average()


def test_parameters_are_dealt_out_evenly():
    parameters = [nn.Parameter(torch.empty(n)) for n in (2, 8, 3, 4, 3)]
    owners = dealt_out(parameters, 2)
    loads = [sum(p.numel() for p in parameters if owners[id(p)] == rank) for rank in (0, 1)]
    assert sorted(loads) == [10, 10]


def test_one_graph_with_gradients_by_way_of_the_hosts_is_refused(lab):
    """A world that XLA does not know: averaging needs values between two graphs."""
    context = lab.context()
    world = World(0, 2, 0, 2, address="127.0.0.1", port=1)
    strategy = TPUSpawnPlugin(compile_step=True)(replace(context, world=world))
    module = nn.Linear(4, 2).to("xla")
    with pytest.raises(UnsupportedError, match="between two graphs"):
        strategy.train_step(
            StepSpec(module, [torch.optim.SGD(module.parameters(), lr=0.1)], lab.loss)
        )
