"""``drivetrain.plugins``: every class name of the two documents, from one table."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
from drivetrain_interfaces.errors import (
    BrokenPackageError,
    ConfigurationError,
    NotFoundError,
    UnsupportedError,
)

from drivetrain import names, plugins
from drivetrain.asking import kind_of, sort_out
from drivetrain.plan import Request

TRAINING_TYPES = [
    "TrainingTypePlugin",
    "SingleDevicePlugin",
    "ParallelPlugin",
    "DataParallelPlugin",
    "DDPPlugin",
    "DDP2Plugin",
    "DDPShardedPlugin",
    "DDPSpawnShardedPlugin",
    "DDPSpawnPlugin",
    "DeepSpeedPlugin",
    "HorovodPlugin",
    "IPUPlugin",
    "IPUStrategy",
    "RPCPlugin",
    "RPCSequentialPlugin",
    "SingleTPUPlugin",
    "TPUSpawnPlugin",
    "SingleHPUStrategy",
    "HPUParallelStrategy",
]
PRECISIONS = [
    "ApexMixedPrecisionPlugin",
    "DeepSpeedPrecisionPlugin",
    "DoublePrecisionPlugin",
    "FullyShardedNativeMixedPrecisionPlugin",
    "HPUPrecisionPlugin",
    "IPUPrecisionPlugin",
    "MixedPrecisionPlugin",
    "NativeMixedPrecisionPlugin",
    "PrecisionPlugin",
    "ShardedNativeMixedPrecisionPlugin",
    "TPUBf16PrecisionPlugin",
    "TPUHalfPrecisionPlugin",
    "TPUPrecisionPlugin",
]
OTHERS = [
    "CheckpointIO",
    "HPUCheckpointIO",
    "TorchCheckpointIO",
    "XLACheckpointIO",
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LightningEnvironment",
    "LSFEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "Accelerator",
    "CPUAccelerator",
    "IPUAccelerator",
    "GPUAccelerator",
    "HPUAccelerator",
]
HERE = {
    "TrainingTypePlugin": "drivetrain_interfaces.strategy.Strategy",
    "SingleDevicePlugin": "drivetrain_toolkit.seeds.SingleDevicePlugin",
    "ParallelPlugin": "drivetrain_toolkit.seeds.ParallelPlugin",
    "DDPPlugin": "drivetrain_toolkit.seeds.DDPPlugin",
    "DDPSpawnPlugin": "drivetrain.plugins.DDPSpawnPlugin",
    "DataParallelPlugin": "drivetrain_toolkit.seed_strategies.DataParallelPlugin",
    "DDP2Plugin": "drivetrain_toolkit.seed_strategies.DDP2Plugin",
    "DDPShardedPlugin": "drivetrain_toolkit.seed_strategies.DDPShardedPlugin",
    "DDPSpawnShardedPlugin": "drivetrain.plugins.DDPSpawnShardedPlugin",
    "RPCPlugin": "drivetrain_toolkit.seed_strategies.RPCPlugin",
    "RPCSequentialPlugin": "drivetrain_toolkit.seed_strategies.RPCSequentialPlugin",
    "PrecisionPlugin": "drivetrain_toolkit.seeds.PrecisionPlugin",
    "MixedPrecisionPlugin": "drivetrain_toolkit.seeds.MixedPrecisionPlugin",
    "NativeMixedPrecisionPlugin": "drivetrain_toolkit.seeds.NativeMixedPrecisionPlugin",
    "DoublePrecisionPlugin": "drivetrain_toolkit.seeds.DoublePrecisionPlugin",
    "ShardedNativeMixedPrecisionPlugin": (
        "drivetrain_toolkit.seeds.ShardedNativeMixedPrecisionPlugin"
    ),
    "FullyShardedNativeMixedPrecisionPlugin": (
        "drivetrain_toolkit.seeds.FullyShardedNativeMixedPrecisionPlugin"
    ),
    "CheckpointIO": "drivetrain_interfaces.checkpoint.CheckpointIO",
    "TorchCheckpointIO": "drivetrain_toolkit.checkpoint.DirectoryCheckpointIO",
    "ClusterEnvironment": "drivetrain_interfaces.cluster.ClusterEnvironment",
    "LightningEnvironment": "drivetrain_toolkit.environments.local.LocalEnvironment",
    "TorchElasticEnvironment": "drivetrain_toolkit.environments.torchrun.TorchRunEnvironment",
    "SLURMEnvironment": "drivetrain_toolkit.environments.slurm.SLURMEnvironment",
    "LSFEnvironment": "drivetrain_toolkit.environments.lsf.LSFEnvironment",
    "KubeflowEnvironment": "drivetrain_toolkit.environments.kubeflow.KubeflowEnvironment",
    "Accelerator": "drivetrain_interfaces.accelerator.Accelerator",
    "CPUAccelerator": "drivetrain_cpu.accelerator.CpuAccelerator",
}


@pytest.fixture
def installed(monkeypatch):
    """Sets which distributions count as installed; the table's own classes are forgotten after."""

    def only(**versions):
        pairs = tuple((name.replace("_", "-"), version) for name, version in versions.items())
        monkeypatch.setattr(plugins, "installed_distributions", lambda: pairs)

    before = dict(vars(plugins))
    yield only
    for name in set(vars(plugins)) - set(before):
        delattr(plugins, name)


def test_every_name_of_the_documents_is_listed():
    assert set(dir(plugins)) == {*TRAINING_TYPES, *PRECISIONS, *OTHERS}


@pytest.mark.parametrize("name", sorted(HERE))
def test_names_of_installed_packages_resolve(name):
    value = getattr(plugins, name)
    assert f"{value.__module__}.{value.__qualname__}" == HERE[name]


@pytest.mark.parametrize("name", sorted({*TRAINING_TYPES, *PRECISIONS, *OTHERS} - {*HERE}))
def test_names_of_other_packages_say_what_to_do(name, installed):
    installed(drivetrain_toolkit="0.1.0")
    with pytest.raises(NotFoundError, match=rf"plugins\.{name} comes with drivetrain-") as caught:
        getattr(plugins, name)
    owner = names.table()["classes"][name]["distribution"]
    upgrade = owner == "drivetrain-toolkit"
    expected = f"Upgrade {owner} to 0.2 (installed: 0.1.0)." if upgrade else f"Install {owner}."
    assert expected in str(caught.value)


def test_a_recent_release_without_the_class_is_a_broken_package(installed, monkeypatch):
    installed(drivetrain_toolkit="0.2.1")
    entry = {"distribution": "drivetrain-toolkit", "target": "drivetrain_toolkit.seeds:Gone"}
    monkeypatch.setitem(names.table()["classes"], "GonePlugin", {**entry, "since": "0.2"})
    with pytest.raises(BrokenPackageError, match=r"drivetrain-toolkit 0\.2\.1"):
        plugins.GonePlugin  # noqa: B018 - looking it up is what is tested


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        plugins.Nonsense  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("drivetrain.plugins.Nonsense")


def test_a_preset_is_one_class_that_pickles():
    spawned = plugins.DDPSpawnPlugin
    assert spawned is plugins.DDPSpawnPlugin
    assert issubclass(spawned, plugins.DDPPlugin)
    copy = pickle.loads(pickle.dumps(spawned(find_unused_parameters=True)))
    assert type(copy) is spawned
    assert copy.ddp_kwargs["find_unused_parameters"] is True


def test_a_preset_brings_its_launcher():
    asks = sort_out(Request(plugins=(plugins.DDPSpawnPlugin(),)))
    assert asks.launcher.value == "spawn"


def test_parts_are_sorted_by_kind():
    kinds = {
        "DDPPlugin": "strategy",
        "SingleDevicePlugin": "strategy",
        "PrecisionPlugin": "precision",
        "DoublePrecisionPlugin": "precision",
        "TorchCheckpointIO": "checkpoint_io",
        "LightningEnvironment": "environment",
        "TorchElasticEnvironment": "environment",
    }
    assert {name: kind_of(getattr(plugins, name)()) for name in kinds} == kinds


def test_what_a_strategy_was_given_counts_as_given_to_the_trainer():
    environment, checkpoint_io = plugins.LightningEnvironment(), plugins.TorchCheckpointIO()
    strategy = plugins.DDPPlugin(
        parallel_devices=["acme", "acme", "acme"],
        cluster_environment=environment,
        checkpoint_io=checkpoint_io,
    )
    asks = sort_out(Request(strategy=strategy))
    assert asks.problems == []
    assert (asks.environment.value, asks.checkpoint_io.value) == (environment, checkpoint_io)
    assert asks.devices.value == 3


def test_the_subclass_of_the_first_document_is_a_strategy():
    class CustomDDPPlugin(plugins.DDPPlugin):
        def configure_ddp(self):
            self._model = self.model

    assert kind_of(CustomDDPPlugin()) == "strategy"


def test_an_override_that_nothing_calls_is_refused():
    with pytest.raises(UnsupportedError, match=r"Mine\.pre_dispatch .* Override prepare"):
        type("Mine", (plugins.DDPPlugin,), {"pre_dispatch": lambda self: None})
    with pytest.raises(UnsupportedError, match=r"Mine\.clip_gradients .* Override step"):
        type("Mine", (plugins.PrecisionPlugin,), {"clip_gradients": lambda self: None})


@pytest.mark.parametrize("argument", ["num_nodes", "sync_batchnorm"])
def test_settings_of_the_trainer_are_refused_on_the_strategy(argument):
    with pytest.raises(ConfigurationError, match=rf"Trainer\({argument}=2\)"):
        plugins.DDPPlugin(**{argument: 2})


def test_communication_hook_is_wrapped_as_it_was():
    strategy = plugins.DDPPlugin(
        ddp_comm_state="state", ddp_comm_hook=len, ddp_comm_wrapper=lambda hook: (hook, "wrapped")
    )
    assert strategy._options.comm_hook == (len, "wrapped")
    assert strategy._options.comm_state == "state"


@pytest.mark.parametrize(
    ("precision", "name"), [(16, "16-mixed"), ("bf16", "bf16-mixed"), ("16-mixed", "16-mixed")]
)
def test_mixed_precision_takes_the_older_arguments(precision, name):
    made = plugins.NativeMixedPrecisionPlugin(precision, "cpu")
    assert made.name == name
    assert made.policy.loss_scaling is (name == "16-mixed")
    assert kind_of(made) == "precision"


def test_mixed_precision_takes_over_the_settings_of_a_scaler():
    import torch

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    state = plugins.MixedPrecisionPlugin(16, "cpu", scaler).state_dict()
    assert (state["scale"], state["growth_interval"]) == (8.0, 3)


@pytest.mark.parametrize("arguments", [(8, "cpu"), ("bf16", "cpu", object())])
def test_mixed_precision_refuses_what_means_nothing(arguments):
    with pytest.raises(ConfigurationError):
        plugins.MixedPrecisionPlugin(*arguments)


def test_a_checkpoint_io_of_the_older_shape_is_refused_instead_of_saving_nothing():
    class Mine(plugins.CheckpointIO):
        def save_checkpoint(self, checkpoint, path):
            pass

    (problem,) = sort_out(Request(plugins=(Mine(),))).problems
    assert "Mine does not implement save, load, exists, remove" in str(problem)


def test_every_entry_of_the_table_is_well_formed():
    for name, entry in names.table()["classes"].items():
        module, _, attribute = entry["target"].partition(":")
        assert module.split(".", maxsplit=1)[0] == entry["distribution"].replace("-", "_"), name
        assert attribute.isidentifier(), name
        assert names.release(entry["since"]), name


def test_the_page_of_older_names_lists_every_one_with_its_package():
    page = Path(__file__).parents[3] / "docs" / "seeds.md"
    if not page.exists():
        pytest.skip("the pages are not part of this distribution")
    rows = page.read_text(encoding="utf-8").splitlines()
    for name, entry in names.table()["classes"].items():
        since = "" if entry["since"] == "0.1" else f" from {entry['since']}"
        start = f"| `{name}` | {entry['distribution']}{since} |"
        assert any(row.startswith(start) for row in rows), start
