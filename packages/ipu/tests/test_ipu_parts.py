"""Probe, options, refusals, names, and what runs beside the programs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import stat
import subprocess
import sys
from typing import Any

import poptorch
import pytest
import torch
from drivetrain_interfaces import (
    CheckpointError,
    Clip,
    ClusterError,
    ConfigurationError,
    DataError,
    LaunchRequest,
    Probe,
    ProcessFailedError,
    ReduceOp,
    StepHooks,
    StorageError,
    UnavailableError,
    UnsupportedError,
    World,
)
from torch import nn

import drivetrain_ipu
from drivetrain_ipu import probing
from drivetrain_ipu.checkpoint import HostCheckpointIO
from drivetrain_ipu.collectives import HostCollectives
from drivetrain_ipu.environment import POPDIST
from drivetrain_ipu.launcher import PoprunLauncher
from drivetrain_ipu.options import (
    SETTERS,
    TRAINING_SETTERS,
    IpuOptions,
    Programs,
    inference_options,
    training_options,
)
from drivetrain_ipu.sdk import load_sdk
from drivetrain_ipu.seeds import IPUAccelerator, IPUPlugin, IPUPrecisionPlugin, IPUStrategy
from drivetrain_ipu.strategy import IpuStrategy


# The probe
@pytest.fixture
def machine(tmp_path: Any) -> Any:
    """Folders of a machine with nothing in them."""
    folders = [tmp_path / name for name in ("dev", "pci", "proc")]
    for folder in folders:
        folder.mkdir()
    return folders


def card(pci: Any, name: Any = "0000:01:00.0") -> Any:
    (pci / name).mkdir()
    (pci / name / "vendor").write_text("0x1d95\n")


def test_no_sdk_is_told(machine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "poptorch is not installed" in probing.look({}, *machine).reason


@pytest.mark.parametrize(
    ("requires", "version", "wanted"),
    [([], "3.4.0", "2.0.1"), (["torch==2.0.1"], "3.4.0", "2.0.1"), ([], "3.2.1", "1.13.1")],
)
def test_another_torch_is_told(
    machine: Any, monkeypatch: Any, requires: Any, version: Any, wanted: Any
) -> None:
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: version if name == "poptorch" else "2.13.0+cpu"
    )
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requires)
    reason = probing.look({}, *machine).reason
    assert f"works with torch {wanted} only, and torch 2.13.0+cpu is installed" in reason
    assert f"torch=={wanted}" in reason


def test_no_device_is_told(machine: Any) -> None:
    found = probing.look({}, *machine)
    assert found.devices == 0
    assert "no IPU is here" in found.reason
    assert "POPTORCH_IPU_MODEL=1" in found.reason


def test_a_missing_driver_is_told(machine: Any) -> None:
    card(machine[1])
    assert "Install and load the driver" in probing.look({}, *machine).reason


def test_busy_devices_are_told_with_who_holds_them(machine: Any) -> None:
    dev, _, proc = machine
    for number in range(2):
        (dev / f"ipu{number}").touch()
    (dev / "ipu0_mailbox").touch()
    assert probing.look({}, *machine) == Probe(2, names=("ipu0", "ipu1"))
    (proc / "41" / "fd").mkdir(parents=True)
    (proc / "41" / "fd" / "3").symlink_to(dev / "ipu0")
    assert probing.look({}, *machine) == Probe(1, names=("ipu1",))
    (proc / "41" / "fd" / "4").symlink_to(dev / "ipu1")
    assert "process 41 holds" in probing.look({}, *machine).reason


def test_the_emulator_a_partition_and_poprun_count(machine: Any) -> None:
    assert probing.look({"POPTORCH_IPU_MODEL": "1"}, *machine).names == ("IPU Model (emulator)",)
    assert probing.look({"IPUOF_VIPU_API_PARTITION_ID": "p"}, *machine).devices == 1
    env = {"POPDIST_NUM_LOCAL_REPLICAS": "2", "POPDIST_NUM_IPUS_PER_REPLICA": "2"}
    assert probing.look(env, *machine).devices == 4
    assert "Start it again" in probing.look({"POPDIST_NUM_LOCAL_REPLICAS": "x"}, *machine).reason


@pytest.mark.parametrize("error", [ImportError, AssertionError, OSError])
def test_an_sdk_that_does_not_import_is_unavailable(monkeypatch: Any, error: Any) -> None:
    class Refuses:
        def find_spec(self, name: Any, path: Any = None, target: Any = None) -> Any:
            if name == "poptorch":
                raise error("libpopart.so")

    monkeypatch.delitem(sys.modules, "poptorch")
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.raises(UnavailableError, match=r"libpopart\.so.*enable script"):
        load_sdk()


def test_nothing_of_the_vendor_is_imported_for_the_spec() -> None:
    code = "import sys, drivetrain_ipu as d; d.spec.probe(); print('poptorch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(("asked", "found"), [("auto", 1), (4, 4), ("2", 2), (-1, 3)])
def test_devices_are_a_number_of_replicas(asked: Any, found: Any) -> None:
    assert len(drivetrain_ipu.parse_replicas(asked, Probe(3), "ipu")) == found


@pytest.mark.parametrize("asked", [0, -2, True, [0, 1], "x", None])
def test_other_requests_for_devices_are_refused(asked: Any) -> None:
    with pytest.raises(ConfigurationError, match="number of replicas"):
        drivetrain_ipu.parse_replicas(asked, Probe(3), "ipu")


# Options
TOLD = {
    "available_memory_proportion": ({"IPU0": 0.5}, "available_memory_proportion"),
    "auto_round_num_ipus": (True, "auto_round_num_ipus"),
    "broadcast_buffers": (False, "broadcast_buffers"),
    "executable_cache": ("/cache", "cache_path"),
    "log_folder": ("/logs", "log_dir"),
    "profile_folder": ("/profile", "profile_dir"),
    "synthetic_data": (True, "synthetic_data"),
    "use_ipu_model": (True, "use_model"),
    "floating_point_exceptions": (True, "Precision.floating_point_exceptions"),
    "num_io_tiles": (32, "TensorLocations.num_io_tiles"),
    "convolution_dithering": (True, "Training.convolution_dithering"),
    "automatic_loss_scaling": (True, "Training.auto_loss_scaling"),
    "stochastic_rounding": (True, "Precision.stochastic_rounding"),
}


def stored(options: Any, path: Any) -> Any:
    for name in path.split("."):
        options = getattr(options, name)
    return options


def programs(replicas: Any = 2, **options: Any) -> Any:
    return Programs(IpuOptions(**options), replicas, World(), 5)


@pytest.mark.parametrize("name", sorted(TOLD))
def test_each_option_is_the_sdks_own(name: Any) -> None:
    value, path = TOLD[name]
    made = training_options(poptorch, programs(**{name: value}), 3)
    assert stored(made, path) == value


def test_every_option_that_is_passed_on_is_tested() -> None:
    told = set(TOLD) | {"engine_options"}
    assert told == set(SETTERS) | set(TRAINING_SETTERS)
    made = training_options(poptorch, programs(engine_options={"a": "b"}), 1)
    assert made._Popart.options["engineOptions"] == {"a": "b"}


def test_options_of_a_training_program() -> None:
    chosen = programs(device_iterations=2, partials="half", on_demand=True)
    made = training_options(poptorch, chosen, 3)
    assert (made.replication_factor, made.device_iterations) == (2, 2)
    assert made.Training.gradient_accumulation == 3
    assert made.output_mode == poptorch.OutputMode.All
    assert made.random_seed == 5
    assert made.Precision.partials_type is torch.half
    assert made.connection_type == poptorch.ConnectionType.OnDemand


def test_options_of_an_evaluation_round_to_nearest_and_accumulate_nothing() -> None:
    chosen = programs(stochastic_rounding=True, inference_device_iterations=2)
    made = inference_options(poptorch, chosen)
    assert made.Training.gradient_accumulation == 1
    assert made.device_iterations == 2
    assert not hasattr(made.Precision, "stochastic_rounding")


def test_a_stray_mpirun_is_passed_over(monkeypatch: Any) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert training_options(poptorch, programs(), 1).Distributed.numProcesses == 1


def test_instances_know_their_place(monkeypatch: Any) -> None:
    world = World(1, 2, 1, 2, address="127.0.0.1", port=1)
    made = training_options(poptorch, Programs(IpuOptions(), 2, world, 5), 1)
    assert (made.Distributed.processId, made.Distributed.numProcesses) == (1, 2)
    for name, value in (("TOTAL", "4"), ("LOCAL", "2")):
        monkeypatch.setenv(f"POPDIST_NUM_{name}_REPLICAS", value)
    monkeypatch.setenv("POPDIST_REPLICA_INDEX_OFFSET", "2")
    world = World(1, 2, 1, 2, address="127.0.0.1", port=1, environment="popdist")
    made = training_options(poptorch, Programs(IpuOptions(), 8, world, 5), 1)
    assert (made.replication_factor, made.Distributed.processId) == (2, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"device_iterations": 0},
        {"replication_factor": -1},
        {"partials": "bfloat16"},
        {"num_io_tiles": 33},
        {"random_seed": -1},
        {"stochastic_rounding": "yes"},
        {"executable_cache": None},
        {"available_memory_proportion": 0.5},
        {"max_grad_norm": 0.0},
        {"loss_scaling": float("inf")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_values_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        IpuStrategy(**wrong)


def test_unknown_options_are_refused_with_the_known() -> None:
    with pytest.raises(ConfigurationError, match=r"gradient_acc.*device_iterations"):
        IpuStrategy(gradient_acc=2)


def test_replicas_that_make_no_power_of_two_are_refused(lab: Any) -> None:
    with pytest.raises(ConfigurationError, match="powers of two"):
        lab.bind(devices=3)
    lab.bind(devices=3, auto_round_num_ipus=True)


# Refusals
def test_hooks_are_refused_by_name(lab: Any) -> None:
    for hook in ("before_backward", "after_backward", "before_optimizer_step", "before_zero_grad"):
        with pytest.raises(UnsupportedError, match=f"The hook {hook} was asked for"):
            lab.build(lab.bind(), hooks=StepHooks(**{hook: print}))


@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping_is_refused_and_the_option_is_named(lab: Any, by: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"clipping by {by}.*max_grad_norm"):
        lab.build(lab.bind(), clip=Clip(1.0, by))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.LBFGS, "LBFGS.*closure"),
        (torch.optim.Adagrad, "Adagrad"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), capturable=True), "tensor for lr"),
        (lambda p: type("Mine", (torch.optim.SGD,), {})(p, lr=0.1), "Mine"),
    ],
    ids=["lbfgs", "adagrad", "amsgrad", "maximize", "tensor", "subclass"],
)
def test_optimizers_that_the_device_lacks_are_refused(lab: Any, make: Any, words: Any) -> None:
    with pytest.raises(UnsupportedError, match=words):
        lab.build(lab.bind(), optimizer=make)


def test_groups_that_differ_in_what_is_one_for_all_are_refused(lab: Any) -> None:
    def make(parameters: Any) -> Any:
        first, *rest = parameters
        groups = [{"params": [first], "centered": True}, {"params": rest}]
        return torch.optim.RMSprop(groups, lr=0.1)

    with pytest.raises(UnsupportedError, match="centered"):
        lab.build(lab.bind(), optimizer=make)
    with pytest.raises(UnsupportedError, match="max_grad_norm"):
        lab.build(lab.bind(max_grad_norm=1.0), optimizer=torch.optim.RMSprop)


def test_a_constant_that_changes_is_refused_with_the_option(lab: Any) -> None:
    (batch,) = lab.batches(1)
    _, optimizer, step = lab.build(lab.bind())
    with step:
        step([batch])
        optimizer.param_groups[0]["momentum"] = 0.1
        with pytest.raises(UnsupportedError, match=r"momentum.*variable=\('lr', 'momentum'\)"):
            step([batch])


def test_a_precision_that_looks_at_gradients_is_refused(lab: Any) -> None:
    toolkit = pytest.importorskip("drivetrain_toolkit.precision", reason="it needs a newer torch")
    with pytest.raises(UnsupportedError, match="loss_scaling"):
        IpuStrategy()(lab.context(toolkit.make_precision("16-mixed", "cpu")))


def test_precisions_refuse_what_a_program_does(lab: Any) -> None:
    precision = lab.backend.precision("32-true")
    with pytest.raises(UnsupportedError, match="strategy 'ipu'"):
        precision.backward(torch.ones(()))
    with pytest.raises(UnsupportedError, match="an update on the host"):
        precision.step([], lambda: None)


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [({"3": 0}, "no module"), ({"0": -1}, "no IPU"), ({"0": 0, "2": 1}, "Accumulate 3 batches")],
)
def test_pipelines_that_cannot_be_are_refused(lab: Any, pipeline: Any, words: Any) -> None:
    with pytest.raises((ConfigurationError, UnsupportedError), match=words):
        lab.build(lab.bind(pipeline=pipeline), accumulate=2)


def test_losses_that_are_none_are_refused(lab: Any) -> None:
    for loss, words in ((lambda m, b: None, "None"), (lambda m, b: m(b[0]), "shape")):
        from drivetrain_interfaces import UserCodeError

        _, _, step = lab.build(lab.bind(), loss=loss)
        with pytest.raises(UserCodeError, match=words), step:
            step(lab.batches(1))


# Loaders
def test_a_loader_is_sized_from_the_plan() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(64.0).reshape(16, 4))
    loader = IpuStrategy(device_iterations=2).loader(data, 2, devices=(0, 1))
    assert isinstance(loader, poptorch.DataLoader)
    assert loader.combinedBatchSize == 8
    assert [len(batch[0]) for batch in loader] == [8, 8]
    assert IpuStrategy(device_iterations=2).loader(data, 2, training=False).combinedBatchSize == 2


def test_data_that_is_too_small_or_cannot_be_divided_is_refused() -> None:
    data = torch.utils.data.TensorDataset(torch.ones(3, 4))
    with pytest.raises(ConfigurationError, match="holds 3 samples, and one batch takes 4"):
        IpuStrategy().loader(data, 2, devices=2)

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.ones(4, 2))

    world = World(1, 2, 1, 2, address="127.0.0.1", port=1)
    with pytest.raises(ConfigurationError, match="Stream can only be iterated"):
        IpuStrategy().loader(Stream(), 2, world=world)
    assert [len(batch) for batch in IpuStrategy().loader(Stream(), 2)] == [2, 2]


# poprun
ENV = {
    "POPDIST_NUM_TOTAL_REPLICAS": "8",
    "POPDIST_NUM_LOCAL_REPLICAS": "2",
    "POPDIST_REPLICA_INDEX_OFFSET": "4",
    "POPDIST_LOCAL_INSTANCE_INDEX": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def test_a_place_is_read_from_poprun() -> None:
    world = POPDIST.world(ENV)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (2, 4, 2, 4)
    assert world.address == "127.0.0.1"
    assert world.port == POPDIST.world({**ENV, "POPDIST_REPLICA_INDEX_OFFSET": "0"}).port
    assert POPDIST.world({**ENV, "PMIX_NAMESPACE": "other"}).port != world.port
    assert not POPDIST.detect({"OMPI_COMM_WORLD_RANK": "0"})


def test_poprun_goes_before_the_mpirun_that_it_starts() -> None:
    mpi = pytest.importorskip("drivetrain_toolkit.environments.mpi", reason="it needs newer torch")
    found = next(value for value in vars(mpi).values() if getattr(value, "name", "") == "mpi")
    assert POPDIST.priority > found.priority


def test_several_hosts_need_an_address() -> None:
    hosts = {**ENV, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "POPDIST_LOCAL_INSTANCE_INDEX": "0"}
    with pytest.raises(ClusterError, match="MASTER_ADDR"):
        POPDIST.world(hosts)
    world = POPDIST.world({**hosts, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (world.address, world.port, world.node_rank) == ("head", 1234, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"POPDIST_NUM_LOCAL_REPLICAS": "3"},
        {"POPDIST_REPLICA_INDEX_OFFSET": "many"},
        {"POPDIST_LOCAL_INSTANCE_INDEX": None},
        {"POPDIST_REPLICA_INDEX_OFFSET": "8"},
    ],
)
def test_variables_that_contradict_are_refused(change: Any) -> None:
    env = {k: v for k, v in {**ENV, **change}.items() if v is not None}
    with pytest.raises(ClusterError, match="poprun"):
        POPDIST.world(env)


def poprun(folder: Any, code: Any) -> Any:
    """A program of that name."""
    program = folder / "poprun"
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_poprun_is_called_with_what_was_asked(tmp_path: Any, monkeypatch: Any) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "--epochs=2"])
    launcher = PoprunLauncher(instances=2, ipus_per_replica=4, options={"vipu-partition": "p"})
    plan = launcher.plan(LaunchRequest(local_size=2))
    assert plan.command[:5] == (
        "poprun",
        "--num-instances=2",
        "--num-replicas=4",
        "--ipus-per-replica=4",
        "--vipu-partition=p",
    )
    assert plan.command[5:] == (sys.executable, str(script), "--epochs=2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="enable script"):
        launcher.launch(print, plan)
    poprun(tmp_path, f"import sys, pathlib; pathlib.Path({str(tmp_path / 'saw')!r})"
           ".write_text(' '.join(sys.argv[1:]))")  # fmt: skip
    assert launcher.launch(print, plan) is None
    assert (tmp_path / "saw").read_text() == " ".join(plan.command[1:])
    poprun(tmp_path, "raise SystemExit(3)")
    with pytest.raises(ProcessFailedError, match="exit code 3"):
        launcher.launch(print, plan)


def test_poprun_needs_a_script(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(ClusterError, match="no script"):
        PoprunLauncher().plan(LaunchRequest())
    with pytest.raises(ClusterError, match="instances=-1"):
        PoprunLauncher(instances=-1)


# Where there is no toolkit
def free_port() -> Any:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def meet(rank: Any, port: Any, answers: Any) -> Any:
    """What one of two ranks finds."""
    world = World(rank, 2, rank, 2, address="127.0.0.1", port=port)
    found = HostCollectives(world)
    mine = torch.tensor([1.0, 2.0]) + rank
    try:
        found.all_gather(torch.ones(2, rank + 1))
        refused = False
    except DataError:
        refused = True
    answers.put(
        (
            rank,
            found.all_reduce(mine).tolist(),
            found.all_reduce(mine, ReduceOp.MEAN).tolist(),
            [t.tolist() for t in found.all_gather(torch.full((rank, 1), 2))],
            found.broadcast(mine, 1).tolist(),
            found.broadcast_object({"of": rank}),
            refused,
            [
                found.all_reduce(torch.tensor([rank], dtype=kind), ReduceOp.MAX).dtype is kind
                for kind in (torch.bool, torch.bfloat16, torch.int16)
            ],
        )
    )
    found.barrier()
    found.close()


def test_hosts_communicate_without_the_toolkit() -> None:
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=meet, args=(rank, port, answers)) for rank in range(2)]
    for each in ranks:
        each.start()
    found = sorted(answers.get(timeout=60) for _ in ranks)
    for each in ranks:
        each.join(60)
    wanted = ([3.0, 5.0], [1.5, 2.5], [[], [[2]]], [2.0, 3.0], {"of": 0}, True, [True] * 3)
    assert [answer[1:] for answer in found] == [wanted, wanted]


def test_one_process_communicates_with_itself() -> None:
    found = HostCollectives(World())
    assert found.all_reduce(torch.ones(2)).tolist() == [1, 1]
    assert found.broadcast_object(3) == 3
    with pytest.raises(UnsupportedError):
        found.all_reduce(torch.ones(2, dtype=torch.int64), ReduceOp.MEAN)
    with pytest.raises(ConfigurationError):
        found.broadcast(torch.ones(1), 1)


def test_checkpoints_come_back_without_the_toolkit(tmp_path: Any) -> None:
    tree: dict[str, Any] = {
        "weights": {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.tensor(True)},
        "half": [torch.ones(2).half(), torch.empty(0, 3)],
        "values": (1, 2.5, "three", None, False, {4: "four"}),
    }
    io, path = HostCheckpointIO(), str(tmp_path / "runs" / "c.ckpt")
    io.save(tree, path)
    io.save(tree, path)
    back = io.load(path)
    assert torch.equal(back["weights"]["a"], tree["weights"]["a"])
    assert torch.equal(back["weights"]["b"], tree["weights"]["b"])
    assert back["weights"]["c"].dtype is torch.bool
    assert back["half"][0].dtype is torch.float16
    assert back["half"][1].shape == (0, 3)
    assert back["values"] == tree["values"]
    assert os.listdir(tmp_path / "runs") == ["c.ckpt"]
    io.remove(path)
    io.remove(path)
    assert not io.exists(path)


def test_a_tensor_that_is_there_twice_is_one_without_the_toolkit(tmp_path: Any) -> None:
    shared, other = torch.ones(3), torch.ones(3)
    io, path = HostCheckpointIO(), str(tmp_path / "c.ckpt")
    io.save({"a": shared, "b": [shared], "c": other}, path)
    back = io.load(path)
    assert back["a"] is back["b"][0]
    assert back["a"] is not back["c"]


def test_drafts_of_killed_processes_go_with_the_next_save(tmp_path: Any) -> None:
    (tmp_path / ".c.ckpt.12345678.draft").write_text("half")
    HostCheckpointIO().save({"a": 1}, str(tmp_path / "c.ckpt"))
    assert os.listdir(tmp_path) == ["c.ckpt"]


def test_damaged_and_foreign_files_are_refused_without_the_toolkit(tmp_path: Any) -> None:
    io, path = HostCheckpointIO(), tmp_path / "c.ckpt"
    io.save({"a": torch.arange(9.0)}, str(path))
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bytes(bad))
        with pytest.raises(CheckpointError):
            io.load(str(path))
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError):
        io.load(str(path))
    with pytest.raises(CheckpointError):
        io.save({}, str(path))
    with pytest.raises(CheckpointError):
        io.remove(str(path))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        io.load(str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="/deep/0"):
        io.save({"deep": [object()]}, str(tmp_path / "d"))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(CheckpointError, match="/circle/0"):
        io.save({"circle": circle}, str(tmp_path / "d"))
    with pytest.raises(CheckpointError, match="on meta"):
        io.save({"none": torch.ones(2, device="meta")}, str(tmp_path / "d"))
    path.write_bytes(good)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(CheckpointError, match="is a link"):
        io.load(str(tmp_path / "link"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        io.save({}, str(tmp_path / "file" / "d"))


# Older names
@pytest.mark.parametrize(
    ("asked", "name"), [(32, "32-true"), (16, "16-mixed"), ("16-true", "16-true")]
)
def test_the_older_precision_is_the_one_of_that_name(asked: Any, name: Any) -> None:
    made = IPUPrecisionPlugin(asked)
    assert isinstance(made, IPUPrecisionPlugin)
    assert made.name == name
    assert pickle.loads(pickle.dumps(made)).name == name
    with pytest.raises(ConfigurationError, match="bf16"):
        IPUPrecisionPlugin("bf16")


def test_the_older_strategy_takes_its_arguments() -> None:
    made = IPUStrategy(device_iterations=2, autoreport=True, autoreport_dir="reports")
    assert isinstance(made, IPUPlugin)
    assert made._options.device_iterations == 2
    assert made._options.profile_folder == "reports"
    assert IPUAccelerator().device_type == "cpu"


def test_modules_with_hooks_of_their_own_are_compiled_in(lab: Any) -> None:
    """A forward hook is traced like the forward; it is no hook of the step."""
    model = nn.Linear(4, 2)
    model.register_forward_hook(lambda m, i, o: o * 2)
    windows = [[b] for b in lab.batches(2)]
    plain = lab.by_hand(model, windows)[0]
    assert lab.train(lab.bind(), windows, model=model)[0] == pytest.approx(plain, rel=1e-6)
