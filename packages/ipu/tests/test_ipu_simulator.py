"""The simulated PopTorch does what the record of the real one says: a test for each rule."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import popdist.poptorch
import poptorch
import pytest
import torch
from poptorch import devices
from poptorch.optim import VariableAttributes
from poptorch.wrapping import PoptorchParameter, plain
from torch import nn

RECORD = json.loads((Path(__file__).parent / "signatures.json").read_text(encoding="utf-8"))


class Step(nn.Module):
    """A step module as a user of PopTorch writes one."""

    def __init__(self, network: Any, *, mark: Any = True) -> None:
        super().__init__()
        self.network = network
        self.mark = mark
        self.seen: list[bool] = []  # shared by copies

    def forward(self, features: Any, targets: Any) -> Any:
        self.seen.append(poptorch.isRunningOnIpu())
        loss = (self.network(features) - targets).square().mean()
        if self.mark and poptorch.isRunningOnIpu():
            loss = poptorch.identity_loss(loss, "none")
        return loss


def linear(seed: Any = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def batch(rows: Any = 4, seed: Any = 0) -> Any:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=made), torch.randn(rows, 2, generator=made)


def options(**training: Any) -> Any:
    made = poptorch.Options()
    made.deviceIterations(training.pop("iterations", 1))
    made.replicationFactor(training.pop("replicas", 1))
    made.Training.gradientAccumulation(training.pop("accumulation", 1))
    assert not training
    return made


@pytest.fixture
def executors() -> Any:
    """Makes executors, and gives their devices back."""
    made = []

    def train(
        module: Any = None, chosen: Any = None, optimizer: Any = None, network: Any = None
    ) -> Any:
        module = module if module is not None else Step(network or linear())
        optimizer = optimizer or poptorch.optim.SGD(module.parameters(), lr=0.1)
        made.append(poptorch.trainingModel(module, chosen or options(), optimizer))
        return made[-1]

    def evaluate(module: Any, chosen: Any = None) -> Any:
        made.append(poptorch.inferenceModel(module, chosen or options()))
        return made[-1]

    vars(train)["evaluate"] = evaluate
    yield train
    for executor in made:
        executor.destroy()
        devices.release(executor)


def by_hand(network: Any, windows: Any, lr: Any = 0.1, reduce: Any = "mean") -> Any:
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    for window in windows:
        losses = [(network(x) - y).square().mean() for x, y in window]
        (sum(losses) / (len(losses) if reduce == "mean" else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


# The record
def objects() -> Any:
    """Every class of the record that the simulator has."""
    made = poptorch.Options()
    known = {
        "Options": poptorch.Options,
        "Options.Training": type(made.Training),
        "Options.Precision": type(made.Precision),
        "Options.TensorLocations": type(made.TensorLocations),
        "Options.Distributed": type(made.Distributed),
        "Options._Popart": type(made._Popart),
        "VariableAttributes": VariableAttributes,
    }
    for name in RECORD["classes"]:
        owner = poptorch.optim if name.startswith("optim.") else poptorch
        found = getattr(owner, name.rpartition(".")[2], None)
        if name not in known and found is not None:
            known[name] = found
    return known


def public(kind: Any) -> Any:
    return {
        name
        for name in vars(kind)
        if not name.startswith("_") and (callable(getattr(kind, name)) or name in vars(kind))
    }


def signature(function: Any) -> Any:
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    text = str(inspect.Signature(parameters))
    return text.replace("<DataLoaderMode.Sync: 0>", "DataLoaderMode.Sync")


@pytest.mark.parametrize("name", sorted(RECORD["functions"]))
def test_functions_have_the_recorded_signatures(name: Any) -> None:
    function = getattr(poptorch, name, None)
    if function is None:
        with pytest.raises(AttributeError):
            getattr(poptorch, name)
        return
    assert signature(function) == RECORD["functions"][name]


@pytest.mark.parametrize("name", sorted(objects()))
def test_classes_have_the_recorded_signatures(name: Any) -> None:
    kind, record = objects()[name], RECORD["classes"][name]
    mine = public(kind) - {"traces", "uploads"} - set(dir(torch.optim.Optimizer))
    assert mine <= set(record), f"the record of {name} has no {sorted(mine - set(record))}"
    for member in (*mine, "__init__"):
        if member in record and "signature" in record[member] and member in vars(kind):
            assert signature(getattr(kind, member)) == record[member]["signature"], member


@pytest.mark.parametrize("name", sorted(RECORD["enums"]))
def test_enumerations_have_the_recorded_values(name: Any) -> None:
    found = {member.name: member.value for member in getattr(poptorch, name)}
    assert found == RECORD["enums"][name]


def test_popdist_has_the_recorded_signatures() -> None:
    for name, recorded in RECORD["popdist"]["functions"].items():
        if hasattr(popdist, name):
            assert signature(getattr(popdist, name)) == recorded
    recorded = RECORD["popdist"]["classes"]["poptorch.Options"]["__init__"]["signature"]
    assert signature(popdist.poptorch.Options.__init__) == recorded


def test_what_the_record_lacks_fails() -> None:
    with pytest.raises(AttributeError):
        poptorch.trainingModelFast  # noqa: B018 - that it is not there
    with pytest.raises(TypeError):
        poptorch.trainingModel(linear(), options(), optimiser=None)
    with pytest.raises(AttributeError):
        poptorch.Options().replicas(2)
    with pytest.raises(AttributeError):
        poptorch.Options().no_such_field  # noqa: B018 - as above


# Options
def test_options_freeze_once_they_are_used(executors: Any) -> None:
    chosen = options()
    executors(chosen=chosen)
    changes: tuple[Any, ...] = (
        lambda: chosen.deviceIterations(2),
        lambda: chosen.Training.gradientAccumulation(2),
    )
    for change in changes:
        with pytest.raises(poptorch.Error, match="frozen"):
            change()
    chosen.clone().deviceIterations(2)


def test_a_loader_freezes_options_too() -> None:
    chosen = options()
    poptorch.DataLoader(chosen, torch.utils.data.TensorDataset(torch.ones(4, 3)), batch_size=2)
    with pytest.raises(poptorch.Error, match="frozen"):
        chosen.replicationFactor(2)


def test_a_stray_mpirun_changes_fresh_options(monkeypatch: Any) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert poptorch.Options().Distributed.numProcesses == 4


def test_options_of_popdist_refuse_what_poprun_decides(monkeypatch: Any) -> None:
    for name, value in (("TOTAL", "4"), ("LOCAL", "2")):
        monkeypatch.setenv(f"POPDIST_NUM_{name}_REPLICAS", value)
    monkeypatch.setenv("POPDIST_REPLICA_INDEX_OFFSET", "2")
    chosen = popdist.poptorch.Options()
    assert (chosen.replication_factor, chosen.Distributed.processId) == (2, 1)
    calls: tuple[Any, ...] = (
        lambda: chosen.replicationFactor(2),
        lambda: chosen.useIpuId(0),
        lambda: chosen.Distributed.configureProcessId(0, 1),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="Cannot call"):
            call()


def test_values_are_checked() -> None:
    with pytest.raises(poptorch.Error):
        poptorch.Options().deviceIterations("2")
    with pytest.raises(poptorch.Error):
        poptorch.Options().TensorLocations.numIOTiles(33)


# Life of an executor
def test_one_call_is_forward_backward_and_update(executors: Any) -> None:
    network = linear()
    executor = executors(network=network)
    before = network.weight.detach().clone()
    executor(*batch())
    assert not torch.equal(network.weight, before)
    assert network.weight.grad is None


def test_training_equals_plain_torch(executors: Any) -> None:
    network = linear()
    executor = executors(network=network)
    for seed in range(3):
        executor(*batch(seed=seed))
    wanted = by_hand(linear(), [[batch(seed=seed)] for seed in range(3)])
    assert torch.equal(network.weight, wanted.weight)


def test_accumulation_takes_the_mean_and_iterations_are_updates(executors: Any) -> None:
    network = linear()
    executor = executors(network=network, chosen=options(accumulation=2, iterations=2))
    executor(*batch(16))
    x, y = batch(16)
    parts = [(x[n : n + 4], y[n : n + 4]) for n in range(0, 16, 4)]
    wanted = by_hand(linear(), [parts[:2], parts[2:]])
    assert torch.allclose(network.weight, wanted.weight, atol=1e-6)


def test_a_sum_of_gradients_is_a_choice(executors: Any) -> None:
    network, chosen = linear(), options(replicas=2)
    chosen.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Sum)
    executors(network=network, chosen=chosen)(*batch(4))
    x, y = batch(4)
    wanted = by_hand(linear(), [[(x[:2], y[:2]), (x[2:], y[2:])]], reduce="sum")
    assert torch.allclose(network.weight, wanted.weight, atol=1e-6)


def test_a_module_is_wrapped_by_its_class_and_once(executors: Any) -> None:
    module = Step(linear())
    executor = executors(module)
    assert type(module).__name__ == "PoptorchStep"
    assert type(module.network.weight) is PoptorchParameter
    with pytest.raises(RuntimeError, match="already been wrapped"):
        poptorch.trainingModel(module, options(), None)
    executor(*batch())
    executor.destroy()
    assert type(module) is Step
    assert type(module.network.weight) is nn.Parameter


def test_destroying_what_was_never_compiled_leaves_it_wrapped(executors: Any) -> None:
    module = Step(linear())
    executors(module).destroy()
    assert type(module).__name__ == "PoptorchStep"


def test_a_device_is_attached_once_and_detached_once(executors: Any) -> None:
    executor = executors()
    with pytest.raises(poptorch.Error, match="not been compiled"):
        executor.attachToDevice()
    executor(*batch())
    with pytest.raises(poptorch.Error, match="already attached"):
        executor.attachToDevice()
    executor.detachFromDevice()
    with pytest.raises(poptorch.Error, match="not attached"):
        executor.detachFromDevice()
    executor(*batch())
    assert executor.isAttachedToDevice()


def test_devices_are_exclusive(executors: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv(devices.VARIABLE, "1")
    first, second = executors(), executors()
    first(*batch())
    with pytest.raises(poptorch.Error, match="Failed to acquire"):
        second(*batch())
    first.detachFromDevice()
    second(*batch())


def test_ipus_come_in_powers_of_two(executors: Any) -> None:
    with pytest.raises(poptorch.Error, match="power of two"):
        executors(chosen=options(replicas=3))(*batch(3))
    executors(chosen=options(replicas=3).autoRoundNumIPUs())(*batch(3))


def test_compiling_again_is_ignored(executors: Any) -> None:
    executor = executors()
    executor(*batch())
    executor.compile(*batch())
    assert executor.traces == 1


# Tracing
def test_forward_runs_once_in_python(executors: Any) -> None:
    module = Step(linear())
    executor = executors(module)
    for _ in range(3):
        executor(*batch())
    assert module.seen == [True]


def test_it_runs_on_an_ipu_only_while_it_is_traced(executors: Any) -> None:
    module = Step(linear())
    executors(module)(*batch())
    assert module.seen == [True]
    assert not poptorch.isRunningOnIpu()
    assert poptorch.identity_loss(torch.ones(2, requires_grad=True), "mean").grad_fn is None


def test_reading_a_value_in_the_forward_fails(executors: Any) -> None:
    class Reads(Step):
        def forward(self, features: Any, targets: Any) -> Any:
            if float(features.sum().item()) > 0:
                return super().forward(features, targets)
            return super().forward(features, targets)

    with pytest.raises(poptorch.Error, match="reads a value"):
        executors(Reads(linear()))(*batch())


def test_a_buffer_may_not_be_reassigned(executors: Any) -> None:
    class Counts(Step):
        def __init__(self, network: Any) -> None:
            super().__init__(network)
            self.count: Any
            self.register_buffer("count", torch.zeros(1))

        def forward(self, features: Any, targets: Any) -> Any:
            self.count = self.count + 1
            return super().forward(features, targets)

    with pytest.raises(poptorch.Error, match="re-assigned"):
        executors(Counts(linear()))(*batch())


def test_a_buffer_that_replicas_write_is_refused(executors: Any) -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(poptorch.Error, match="broadcastBuffers"):
        executors(network=network, chosen=options(replicas=2))(*batch(4))


def test_wide_types_are_narrowed(executors: Any) -> None:
    class Sums(nn.Module):
        def forward(self, whole: Any, wide: Any) -> Any:
            return whole.sum(), wide.sum()

    executor = executors.evaluate(Sums())
    whole, wide = executor(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64))
    assert (whole.dtype, wide.dtype) == (torch.int32, torch.float32)


def test_products_of_mixed_types_are_made_in_float32(executors: Any) -> None:
    class Product(nn.Module):
        def forward(self, half: Any, single: Any) -> Any:
            return half @ single

    executor = executors.evaluate(Product())
    assert executor(torch.ones(2, 2).half(), torch.ones(2, 2)).dtype is torch.float32


# Arguments and results
def test_arguments_must_stay_what_they_were(executors: Any) -> None:
    class Scaled(nn.Module):
        def forward(self, features: Any, scale: Any = 1) -> Any:
            return features * scale

    executor = executors.evaluate(Scaled())
    executor(torch.ones(2), scale=2)
    for args, kwargs in (
        ((torch.ones(2),), {"scale": 3}),
        ((torch.ones(4),), {"scale": 2}),
        ((torch.ones(2).half(),), {"scale": 2}),
        ((torch.ones(2), 2), {}),
    ):
        with pytest.raises(poptorch.Error, match="recompile"):
            executor(*args, **kwargs)


def test_arguments_are_those_of_the_forward(executors: Any) -> None:
    features, targets = batch()
    executor = executors()
    with pytest.raises(poptorch.Error, match="Mandatory parameter targets missing"):
        executor(features)
    with pytest.raises(AssertionError, match="Too many arguments"):
        executor(features, targets, targets)
    executor(features, targets=targets)


def test_a_batch_must_be_a_multiple(executors: Any) -> None:
    with pytest.raises(AssertionError, match="Invalid batch dimension"):
        executors(chosen=options(accumulation=3))(*batch(4))


@pytest.mark.parametrize(
    ("mode", "rows"),
    [("All", 8), ("Final", 2), ("Sum", 2), ("EveryN", 4)],
)
def test_outputs_come_as_the_mode_says(executors: Any, mode: Any, rows: Any) -> None:
    chosen = options(replicas=2, iterations=2, accumulation=2)
    chosen.outputMode(getattr(poptorch.OutputMode, mode), 2 if mode == "EveryN" else None)
    found = executors(chosen=chosen)(*batch(16))
    assert found.shape == (rows,)


def test_a_sum_of_outputs_is_one(executors: Any) -> None:
    both = []
    for mode in ("All", "Sum"):
        chosen = options(accumulation=2).outputMode(getattr(poptorch.OutputMode, mode))
        both.append(executors(chosen=chosen)(*batch(8)))
    assert float(both[0].sum()) == pytest.approx(float(both[1]))


def test_inference_takes_no_accumulation(executors: Any) -> None:
    with pytest.raises(poptorch.Error, match="must be 1 for inference"):
        executors.evaluate(linear(), options(accumulation=2))


# Losses
def test_a_loss_must_be_marked(executors: Any) -> None:
    with pytest.raises(poptorch.Error, match="Couldn't find a loss"):
        executors(Step(linear(), mark=False))(*batch())


def test_losses_that_are_known_need_no_mark(executors: Any) -> None:
    class Known(Step):
        def forward(self, features: Any, targets: Any) -> Any:
            return nn.functional.mse_loss(self.network(features), targets)

    executors(Known(linear()))(*batch())


def test_two_losses_that_depend_not_on_each_other_are_refused(executors: Any) -> None:
    class Two(Step):
        def forward(self, features: Any, targets: Any) -> Any:
            loss = super().forward(features, targets)
            return loss, nn.functional.l1_loss(self.network(features), targets)

    with pytest.raises(poptorch.Error, match="Multiple independent losses"):
        executors(Two(linear()))(*batch())


# Optimizers
def test_other_optimizers_are_refused(executors: Any) -> None:
    network = linear()
    with pytest.raises(AssertionError, match="Unsupported optimizer type"):
        executors(network=network, optimizer=torch.optim.Adagrad(network.parameters()))


def test_amsgrad_is_refused_and_maximize_is_ignored(executors: Any) -> None:
    network = linear()
    with pytest.raises(ValueError, match="amsgrad"):
        executors(network=network, optimizer=torch.optim.Adam(network.parameters(), amsgrad=True))
    network = linear()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, maximize=True)
    executors(network=network, optimizer=optimizer)(*batch())
    assert torch.equal(network.weight, by_hand(linear(), [[batch()]]).weight)


def test_parameters_must_be_of_the_module(executors: Any) -> None:
    with pytest.raises(KeyError):
        executors(optimizer=poptorch.optim.SGD(linear().parameters(), lr=0.1))(*batch())


def test_a_constant_attribute_cannot_change(executors: Any) -> None:
    network = linear()
    optimizer = poptorch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
    optimizer.variable_attrs.markAsConstant("momentum")
    executor = executors(network=network, optimizer=optimizer)
    executor(*batch())
    optimizer.param_groups[0]["lr"] = 0.2
    executor.setOptimizer(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="momentum"):
        executor.setOptimizer(optimizer)


def test_the_state_of_an_optimizer_is_on_the_device(executors: Any) -> None:
    network = linear()
    optimizer = poptorch.optim.Adam(network.parameters(), lr=0.1)
    executor = executors(network=network, optimizer=optimizer)
    assert optimizer.state_dict()["ipu_state"] is None
    executor(*batch())
    found = optimizer.state_dict()["ipu_state"]
    assert float(found["Step___network.weight"]) == 1
    executor(*batch())
    assert float(optimizer.state_dict()["ipu_state"]["Step___network.weight"]) == 2
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_the_state_of_torchs_own_optimizer_cannot_be_read(executors: Any) -> None:
    network = linear()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
    executor = executors(network=network, optimizer=optimizer)
    executor(*batch())
    executor.detachFromDevice()
    assert not optimizer.state


# Weights
def test_weights_on_the_host_are_stale_until_somebody_looks(executors: Any) -> None:
    network = linear()
    executor = executors(network=network)
    inner = network.weight.data_ptr()
    assert inner
    executor(*batch())
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(network.weight, linear().weight)
    assert executor.copyWeightsToHostIfNeeded()
    assert not executor.copyWeightsToHostIfNeeded()
    assert not torch.equal(network.weight, linear().weight)


def test_detaching_brings_weights_and_state_back(executors: Any) -> None:
    network = linear()
    optimizer = poptorch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
    executor = executors(network=network, optimizer=optimizer)
    for seed in range(4):
        executor(*batch(seed=seed))
        executor.detachFromDevice()
    wanted = linear()
    plain = torch.optim.SGD(wanted.parameters(), lr=0.1, momentum=0.5)
    for seed in range(4):
        x, y = batch(seed=seed)
        (wanted(x) - y).square().mean().backward()
        plain.step()
        plain.zero_grad()
    assert torch.equal(network.weight, wanted.weight)


def test_changes_on_the_host_are_not_uploaded_by_themselves(executors: Any) -> None:
    network = linear()
    executor = executors(network=network)
    executor(*batch())
    with torch.no_grad():
        network.weight.zero_()
    executor(*batch())
    assert not torch.equal(network.weight, torch.zeros(2, 3))
    with torch.no_grad():
        network.weight.zero_()
    executor.copyWeightsToDevice()
    found = executor(*batch())
    x, y = batch()
    bias = network.bias.detach()
    assert found.shape == ()
    assert bias.shape == y.shape[1:]
    assert x.shape[0] == y.shape[0]


def test_an_evaluation_that_stays_attached_keeps_its_weights(executors: Any) -> None:
    network = linear()
    executor = executors.evaluate(network)
    x, _ = batch()
    first = executor(x)
    with torch.no_grad():
        network.weight.zero_()
    assert torch.equal(executor(x), first)
    executor.copyWeightsToDevice()
    assert torch.equal(executor(x), network.bias.expand(4, 2))


def test_an_evaluation_of_what_is_trained_asks_for_its_weights(executors: Any) -> None:
    module = Step(linear())
    training = executors(module)
    evaluation = executors.evaluate(module)
    for seed in range(2):
        training(*batch(seed=seed))
        training.detachFromDevice()
        x, y = batch(seed=9)
        wanted = by_hand(linear(), [[batch(seed=s)] for s in range(seed + 1)])
        loss = (wanted(x) - y).square().mean().detach()
        assert float(evaluation(x, y)) == pytest.approx(float(loss))
        # It stays attached, and has the weights of the next round all the same.


def instance(rank: Any, port: Any, answers: Any) -> Any:
    """One of two processes that train one model."""
    place = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    chosen, network = options(), linear()
    chosen.Distributed.configureProcessId(rank, 2)
    optimizer = poptorch.optim.SGD(network.parameters(), lr=0.1)
    executor = poptorch.trainingModel(Step(network), chosen, optimizer)
    executor(*batch(seed=rank))
    executor.detachFromDevice()
    answers.put((rank, plain(network.weight).tolist()))
    torch.distributed.destroy_process_group()


def test_instances_reduce_their_gradients_on_the_device() -> None:
    context = multiprocessing.get_context("fork")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    answers = context.Queue()
    ranks = [context.Process(target=instance, args=(rank, port, answers)) for rank in range(2)]
    for each in ranks:
        each.start()
    weights = dict(answers.get(timeout=60) for _ in ranks)
    for each in ranks:
        each.join(60)
    wanted = by_hand(linear(), [[batch(seed=0), batch(seed=1)]]).weight.detach()
    for weight in weights.values():
        assert torch.allclose(torch.tensor(weight), wanted, atol=1e-6)


# Pipelines
def test_a_pipeline_needs_enough_microbatches(executors: Any) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for number, layer in enumerate(network):
        poptorch.BeginBlock(layer, f"block{number}", ipu_id=number)
    chosen = options(accumulation=2)
    chosen.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
    with pytest.raises(poptorch.Error, match="needs gradient accumulation of 3"):
        executors(network=network, chosen=chosen)(*batch(4))
    with pytest.raises(poptorch.Error, match="already been assigned"):
        poptorch.BeginBlock(network[0], "again")
    poptorch.removeBlocks(network)
    poptorch.BeginBlock(network[0], "again")
