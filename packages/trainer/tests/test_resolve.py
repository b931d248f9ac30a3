"""Selection: what is chosen, what is refused, and what the record says. No torch, no hardware."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest
from drivetrain_interfaces.accelerator import DeviceFacts
from drivetrain_interfaces.backend import EAGER, BackendSpec, Probe, StrategySpec
from drivetrain_interfaces.capabilities import Capabilities, Feature, StepHook
from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.discovery import BackendEntry, Inventory, StrategyEntry
from drivetrain_interfaces.errors import (
    BrokenPackageError,
    ClusterError,
    ConfigurationError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from drivetrain_interfaces.precision import PrecisionPolicy

from drivetrain.names import table
from drivetrain.plan import ClusterFinding, Machine, Request, Want
from drivetrain.resolve import check_wants, resolve

ALL = Capabilities(
    features=frozenset(Feature),
    precisions=frozenset({"32-true", "bf16-mixed", "16-mixed", "64-true"}),
)


def never_loaded():
    raise AssertionError("resolving must not load a backend")


def backend(
    name="acme", devices=4, priority=50, capabilities=ALL, reason="", problem=None, **facts
):
    given = {"device_type": name, "collective_backend": "gloo", "autocast_type": name, **facts}
    spec = BackendSpec(
        name=name,
        contract=CONTRACT,
        capabilities=capabilities,
        facts=DeviceFacts(**given),
        strategies=("single_device", "ddp"),
        probe=never_loaded,
        load=never_loaded,
        priority=priority,
    )
    probe = Probe(devices, reason)
    if problem is not None:
        return BackendEntry(name, f"drivetrain-{name} 1.2", problem=problem)
    return BackendEntry(name, f"drivetrain-{name} 1.2", spec=spec, probe=probe)


HOST = backend("host", devices=8, priority=0, indexed=False, default_devices=1)


def machine(*backends, world=None, evidence=("RUN=7",), strategies=(), **rest):
    cluster = ClusterFinding()
    if world is not None:
        cluster = ClusterFinding(world=world, environment="torchrun", evidence=evidence)
    return Machine(
        inventory=Inventory(
            backends=backends or (backend(),),
            strategies=strategies,
            environments=("local", "torchrun"),
            launchers=("attach", "fork", "script", "spawn"),
        ),
        **{"cluster": cluster, **rest},
    )


def plan_of(request=None, where=None, **arguments):
    return resolve(request or Request(**arguments), where or machine()).plan


def refused(kind, where=None, **arguments):
    with pytest.raises(kind) as caught:
        resolve(Request(**arguments), where or machine())
    assert type(caught.value) is kind
    return str(caught.value)


def world(size=2, local_size=None, rank=0):
    local = local_size or size
    return World(rank, size, rank % local, local, rank // local, "10.0.0.1", 29500)


class TestAccelerator:
    def test_auto_takes_the_available_backend_of_highest_priority(self):
        fast = backend("fast", priority=90)
        assert plan_of(where=machine(HOST, backend(), fast)).backend == "fast"

    def test_auto_skips_a_broken_backend_and_says_so(self):
        broken = backend("fast", priority=90, problem=BrokenPackageError("It fell over.", "Mend."))
        plan = plan_of(where=machine(broken, HOST))
        assert plan.backend == "host"
        assert "fast - skipped: It fell over." in plan.explain()

    def test_auto_skips_a_backend_without_devices_and_gives_its_reason(self):
        plan = plan_of(where=machine(backend("fast", devices=0, reason="no driver"), HOST))
        assert plan.backend == "host"
        assert "fast - unavailable: no driver" in plan.explain()

    def test_auto_without_anything_available_lists_why(self):
        text = refused(UnavailableError, machine(backend("fast", devices=0, reason="no driver")))
        assert "fast: unavailable: no driver" in text

    def test_without_any_backend_the_error_says_to_install_one(self):
        text = refused(NotFoundError, Machine())
        assert "Install the one for your hardware" in text

    def test_unknown_name_lists_what_exists_and_suggests_the_nearest(self):
        text = refused(NotFoundError, accelerator="acmee")
        assert "installed: acme, auto" in text
        assert "Use 'acme'" in text

    def test_known_name_that_is_not_installed_names_its_package(self):
        text = refused(NotFoundError, accelerator="cpu")
        assert "Install drivetrain-cpu." in text

    def test_a_strategy_given_as_accelerator_is_pointed_out(self):
        assert "Use strategy='ddp'" in refused(NotFoundError, accelerator="ddp")

    def test_named_but_unavailable_raises_with_the_reason_of_the_probe(self):
        where = machine(backend(devices=0, reason="No driver found. Install acme-driver."), HOST)
        text = refused(UnavailableError, where, accelerator="acme")
        assert "drivetrain-acme 1.2 found no device on this machine: No driver found." in text

    def test_named_but_broken_raises_the_package_error(self):
        where = machine(backend(problem=BrokenPackageError("It fell over.", "Mend it.")))
        assert "It fell over." in refused(BrokenPackageError, where, accelerator="acme")

    def test_spec_object_is_used(self):
        entry = backend()
        assert plan_of(where=machine(entry), accelerator=entry.spec).backend == "acme"

    def test_something_else_is_a_configuration_error(self):
        assert "accelerator=3 is a int" in refused(ConfigurationError, accelerator=3)


class AcmeAccelerator:
    device_type = "acme"
    facts = backend().spec.facts

    def __init__(self, precision_plugin=None, training_type_plugin=None):
        self.precision_plugin = precision_plugin
        self.training_type_plugin = training_type_plugin

    def device_count(self):
        return 4

    def activate(self, index, local_size):
        return "acme"

    def synchronize(self, device):
        pass

    def close(self):
        pass


class OwnPrecision:
    name = "own"
    policy = PrecisionPolicy()

    def convert(self, module):
        return module

    def forward(self):
        return nullcontext()

    def backward(self, loss):
        loss.backward()

    def step(self, optimizers, prepare):
        return True

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class OwnStrategy:
    """A configured object that makes the bound one, as those of the toolkit do."""

    def __call__(self, context):
        return self

    @property
    def device(self):
        raise AssertionError("an unbound strategy has no device, and sorting must not ask")

    def prepare(self, module):
        return module

    feed = train_step = eval_step = load = prepare

    def state(self):
        return None

    def close(self):
        pass


class OwnCheckpointIO:
    def save(self, tree, path):
        pass

    def load(self, path):
        return {}

    def exists(self, path):
        return False

    def remove(self, path):
        pass


class OwnEnvironment:
    name = "own"

    def detect(self, env):
        return ()

    def world(self, env):
        return World()


class OwnLauncher:
    interactive = False

    def plan(self, request):
        pass

    def launch(self, main, plan):
        pass


class TestAcceleratorObject:
    def test_finds_the_backend_of_its_device_type(self):
        accelerator = AcmeAccelerator()
        resolution = resolve(Request(accelerator=accelerator), machine(HOST, backend()))
        assert resolution.plan.backend == "acme"
        assert resolution.parts.accelerator is accelerator

    def test_its_plugins_count_as_plugins(self):
        precision, strategy = OwnPrecision(), OwnStrategy()
        given = AcmeAccelerator(precision_plugin=precision, training_type_plugin=strategy)
        resolution = resolve(Request(accelerator=given, devices=2), machine())
        assert resolution.parts.precision is precision
        assert resolution.parts.strategy_factory is strategy
        assert "AcmeAccelerator(precision_plugin=OwnPrecision(...))" in resolution.plan.explain()

    def test_without_a_backend_for_it_the_device_type_is_named(self):
        text = refused(NotFoundError, machine(HOST), accelerator=AcmeAccelerator())
        assert "'acme' devices" in text
        assert "host" in text


class TestDevices:
    def test_auto_is_what_the_facts_say(self):
        assert plan_of(where=machine(HOST)).devices == (0,)
        assert plan_of(where=machine(backend(devices=3))).devices == (0, 1, 2)

    @pytest.mark.parametrize("devices", [[1, 3], "1,3"])
    def test_a_list_is_kept(self, devices):
        plan = plan_of(devices=devices)
        assert (plan.devices, plan.world_size) == ((1, 3), 2)

    @pytest.mark.parametrize("devices", [0, 5, [], [1, 1], [4], "many", True])
    def test_impossible_ones_are_refused_with_what_there_is(self, devices):
        assert "found 4" in refused(ConfigurationError, devices=devices)

    @pytest.mark.parametrize("num_nodes", [0, -1, 1.5, True, "2"])
    def test_num_nodes_must_be_a_positive_whole_number(self, num_nodes):
        assert "num_nodes=" in refused(ConfigurationError, num_nodes=num_nodes)

    def test_one_process_drives_all_devices_where_the_facts_say_so(self):
        where = machine(backend(several_devices_launcher="none"))
        plan = plan_of(where=where, devices=4)
        assert (plan.world_size, plan.local_size, plan.launcher) == (1, 1, "none")
        assert plan.strategy == "ddp"


class TestGpus:
    def test_a_strategy_may_want_a_process_for_each_device_all_the_same(self):
        whole = backend(several_devices_launcher="none", process_launcher="spawn")
        alone = Capabilities(features=frozenset(), precisions=ALL.precisions)
        spec = replace(whole.spec, strategy_capabilities={"single_device": alone, "spmd": alone})
        spec = replace(
            spec,
            strategies=("single_device", "spmd", "ddp"),
            facts=replace(spec.facts, several_devices_strategy="spmd"),
        )
        where = machine(replace(whole, spec=spec))
        plan = plan_of(where=where, devices=3)
        assert (plan.strategy, plan.world_size, plan.launcher) == ("spmd", 1, "none")
        plan = plan_of(where=where, devices=3, strategy="ddp")
        assert (plan.world_size, plan.launcher, plan.devices) == (3, "spawn", (0, 1, 2))
        plan = plan_of(where=where, devices=3, strategy="ddp", launcher="fork")
        assert plan.launcher == "fork"
        assert not plan_of(where=where, devices=3, strategy="spmd").capabilities.features

    def test_excludes_the_host_and_says_so_once(self):
        favourite = replace(HOST, spec=replace(HOST.spec, priority=99))
        plan = plan_of(where=machine(favourite, backend()), gpus=2)
        assert (plan.backend, plan.devices) == ("acme", (0, 1))
        assert sum("gpus=2 is short for" in notice for notice in plan.notices) == 1

    def test_without_any_such_backend_is_an_error(self):
        assert "gpus=1 was asked for" in refused(UnavailableError, machine(HOST), gpus=1)

    def test_none_of_them_means_the_host(self):
        assert plan_of(where=machine(HOST, backend()), gpus=0).backend == "host"

    def test_and_devices_together_conflict(self):
        text = refused(ConfigurationError, gpus=2, devices=2)
        assert "devices=2 and gpus=2" in text

    def test_and_the_host_by_name_conflict(self):
        text = refused(ConfigurationError, machine(HOST), gpus=2, accelerator="host")
        assert "exclude each other" in text

    def test_more_than_there_are_is_refused_in_the_words_of_the_user(self):
        assert "gpus=9 means devices" in refused(ConfigurationError, gpus=9)


class TestCluster:
    def test_devices_follow_what_was_started(self):
        plan = plan_of(where=machine(world=world(6, local_size=3)))
        assert (plan.devices, plan.local_size) == ((0, 1, 2), 3)
        assert (plan.world_size, plan.num_nodes, plan.launcher) == (6, 2, "attach")
        assert plan.environment == "torchrun"

    def test_even_a_world_of_one_is_joined(self):
        assert plan_of(where=machine(world=world(1))).launcher == "attach"

    def test_contradiction_quotes_both_facts(self):
        where = machine(world=world(1), evidence=("NTASKS=1",))
        text = refused(ClusterError, where, devices=2)
        assert "devices=2 with num_nodes=1 makes 2 processes" in text
        assert "torchrun started 1 (NTASKS=1)" in text

    def test_contradicting_num_nodes_is_refused(self):
        where = machine(world=world(4, local_size=2))
        assert "makes 2 machines" in refused(ClusterError, where, num_nodes=3)

    def test_the_same_total_spread_otherwise_is_refused(self):
        where = machine(world=world(4, local_size=1))
        text = refused(ClusterError, where, devices=4, num_nodes=1)
        assert "started 1 on this one" in text

    def test_more_processes_than_devices_is_refused(self):
        text = refused(ClusterError, machine(backend(devices=2), world=world(3)))
        assert "started 3 processes on this machine (RUN=7)" in text

    def test_an_unreadable_world_is_reported_as_found(self):
        problem = ClusterError("RANK=9 is outside.", "Correct it.")
        where = machine(cluster=ClusterFinding(environment="torchrun", problem=problem))
        text = refused(ClusterError, where)
        assert "RANK=9 is outside." in text
        assert "cluster environment: torchrun" in text

    def test_several_machines_without_a_manager_need_a_meeting_point(self):
        text = refused(ClusterError, machine(address="10.0.0.1"), num_nodes=2)
        assert "NODE_RANK, MASTER_PORT are not set" in text

    def test_several_machines_with_a_meeting_point_keep_it(self):
        plan = plan_of(where=machine(node_rank=1, address="10.0.0.1", port=29500), num_nodes=2)
        assert (plan.node_rank, plan.address, plan.port) == (1, "10.0.0.1", 29500)
        assert (plan.world_size, plan.launcher) == (8, "script")


class TestStrategy:
    def test_auto_follows_the_facts_and_the_number_of_devices(self):
        assert plan_of(devices=1).strategy == "single_device"
        assert plan_of(devices=2).strategy == "ddp"

    def test_several_devices_on_a_strategy_for_one_conflict(self):
        text = refused(ConfigurationError, strategy="single_device", devices=2)
        assert "Use devices=1, or strategy='ddp'." in text

    def test_unknown_name_suggests_the_nearest(self):
        assert "Use 'ddp'" in refused(NotFoundError, strategy="ddq")

    def test_known_one_of_a_later_release_says_to_upgrade(self, monkeypatch):
        entry = {"distribution": "drivetrain-toolkit", "since": "0.2"}
        monkeypatch.setitem(table()["strategies"], "zero9", entry)
        where = machine(distributions=(("drivetrain-toolkit", "0.1.0.dev0"),))
        text = refused(NotFoundError, where, strategy="zero9")
        assert "Upgrade drivetrain-toolkit to 0.2 (installed: 0.1.0.dev0)." in text

    def test_known_one_that_is_not_installed_says_what_to_install(self):
        assert "Install drivetrain-toolkit." in refused(NotFoundError, strategy="fsdp")

    def test_removed_one_says_what_took_its_place(self, monkeypatch):
        monkeypatch.setitem(table()["strategies"], "gone", {"removed": "Use strategy='ddp'."})
        assert "Use strategy='ddp'" in refused(NotFoundError, strategy="gone")

    @pytest.mark.parametrize(
        ("name", "launcher", "options"),
        [
            ("ddp_spawn", "spawn", ()),
            ("ddp_fork", "fork", ()),
            ("ddp_notebook", "fork", ()),
            ("ddp_find_unused_parameters_true", "script", (("find_unused_parameters", True),)),
            ("ddp_find_unused_parameters_false", "script", (("find_unused_parameters", False),)),
            ("ddp_spawn_find_unused_parameters_true", "spawn", (("find_unused_parameters", True),)),
        ],
    )
    def test_old_names_are_spelled_out(self, name, launcher, options):
        plan = plan_of(strategy=name, devices=2)
        assert (plan.strategy, plan.launcher, plan.options) == ("ddp", launcher, options)
        assert sum(f"strategy={name!r} is an older name" in notice for notice in plan.notices) == 1

    def test_a_name_whose_place_another_took_is_read_as_that(self):
        sharded = StrategySpec("zero1", CONTRACT, frozenset({"acme"}), ALL, never_loaded)
        where = machine(strategies=(StrategyEntry("zero1", "toolkit 1.0", sharded),))
        plan = plan_of(where=where, strategy="ddp_sharded_spawn", devices=2)
        assert (plan.strategy, plan.launcher) == ("zero1", "spawn")
        assert any("read as strategy='zero1', launcher='spawn'" in one for one in plan.notices)

    def test_a_strategy_for_eager_devices_fits_those_that_say_so(self):
        spec = StrategySpec("wide", CONTRACT, frozenset({EAGER}), ALL, never_loaded)
        where = machine(strategies=(StrategyEntry("wide", "toolkit 1.0", spec),))
        assert "runs on eager devices" in refused(UnsupportedError, where, strategy="wide")
        where = machine(backend(eager=True), strategies=where.inventory.strategies)
        assert plan_of(where=where, strategy="wide").strategy == "wide"

    def test_old_name_against_another_launcher_conflicts(self):
        text = refused(ConfigurationError, strategy="ddp_spawn", launcher="fork", devices=2)
        assert "includes the launcher 'spawn'" in text

    def test_package_strategy_has_what_both_can_do(self):
        can = replace(ALL, features=frozenset({Feature.SEVERAL_PROCESSES}))
        spec = StrategySpec("engine", CONTRACT, frozenset({"acme"}), can, never_loaded)
        where = machine(strategies=(StrategyEntry("engine", "drivetrain-engine 1.0", spec),))
        plan = plan_of(where=where, strategy="engine", devices=2)
        assert plan.capabilities.features == {Feature.SEVERAL_PROCESSES}

    def test_package_strategy_for_other_devices_is_refused(self):
        spec = StrategySpec("engine", CONTRACT, frozenset({"else"}), ALL, never_loaded)
        where = machine(strategies=(StrategyEntry("engine", "drivetrain-engine 1.0", spec),))
        text = refused(UnsupportedError, where, strategy="engine")
        assert "drivetrain-engine 1.0 runs on else devices" in text

    def test_broken_strategy_package_is_reported_when_asked_for(self):
        problem = BrokenPackageError("The engine fell over.", "Reinstall it.")
        where = machine(strategies=(StrategyEntry("engine", "d 1.0", problem=problem),))
        assert "The engine fell over." in refused(BrokenPackageError, where, strategy="engine")
        assert plan_of(where=where, devices=1).strategy == "single_device"

    def test_object_is_used_as_factory_and_may_name_a_launcher(self):
        strategy = OwnStrategy()
        strategy.launcher = "spawn"
        resolution = resolve(Request(strategy=strategy, devices=2), machine())
        assert resolution.parts.strategy_factory is strategy
        assert (resolution.plan.strategy, resolution.plan.launcher) == ("OwnStrategy", "spawn")

    def test_class_instead_of_object_is_refused(self):
        refused(ConfigurationError, strategy=OwnStrategy)


class TestPrecision:
    def test_default_is_full(self):
        assert plan_of().precision == "32-true"

    @pytest.mark.parametrize(
        ("asked", "name", "notices"),
        [
            (16, "16-mixed", 1),
            ("16", "16-mixed", 1),
            (32, "32-true", 0),
            ("64", "64-true", 0),
            ("bf16", "bf16-mixed", 1),
            ("bf16-mixed", "bf16-mixed", 0),
        ],
    )
    def test_short_forms_are_spelled_out_and_ambiguous_ones_noticed(self, asked, name, notices):
        plan = plan_of(precision=asked)
        assert plan.precision == name
        assert len(plan.notices) == notices

    def test_unknown_name_suggests_the_nearest(self):
        assert "Use 'bf16-mixed'" in refused(NotFoundError, precision="bf16-mixe")

    def test_known_name_that_cannot_be_made_lists_what_can(self):
        few = replace(ALL, precisions=frozenset({"32-true"}))
        text = refused(UnsupportedError, machine(backend(capabilities=few)), precision=16)
        assert "precision=16, which means '16-mixed', was asked for" in text
        assert "makes 32-true" in text

    def test_default_falls_back_with_a_notice(self):
        few = replace(ALL, precisions=frozenset({"bf16-mixed"}))
        plan = plan_of(where=machine(backend(capabilities=few)))
        assert plan.precision == "bf16-mixed"
        assert "does not make '32-true'" in plan.notices[0]

    @pytest.mark.parametrize("precision", [1.5, True, object()])
    def test_other_types_are_refused(self, precision):
        refused(ConfigurationError, precision=precision)


class TestLauncher:
    def test_one_process_needs_none(self):
        assert plan_of(devices=1).launcher == "none"

    def test_facts_choose_for_scripts_and_prompts(self):
        assert plan_of(devices=2).launcher == "script"
        assert plan_of(where=machine(interactive=True), devices=2).launcher == "spawn"

    def test_unknown_name_suggests_the_nearest(self):
        assert "Use 'spawn'" in refused(NotFoundError, launcher="spwan", devices=2)

    def test_named_one_is_refused_where_processes_run_already(self):
        text = refused(ClusterError, machine(world=world(2)), launcher="spawn")
        assert "torchrun has started them already (RUN=7)" in text

    def test_named_one_counts_as_met_in_the_processes_that_it_started(self):
        where = machine(world=world(2), launched_by="spawn")
        plan = plan_of(where=where, launcher="spawn", devices=2)
        assert plan.launcher == "attach"

    def test_attach_needs_something_to_attach_to(self):
        assert "nothing shows" in refused(ClusterError, launcher="attach")

    def test_none_cannot_serve_several_processes(self):
        assert "starts no process" in refused(ConfigurationError, launcher="none", devices=2)

    def test_one_for_scripts_is_refused_at_a_prompt(self):
        text = refused(ConfigurationError, machine(interactive=True), launcher="script", devices=2)
        assert "Use launcher='spawn'" in text

    def test_object_that_needs_a_script_is_refused_at_a_prompt(self):
        where = machine(interactive=True)
        text = refused(ConfigurationError, where, launcher=OwnLauncher(), devices=2)
        assert "OwnLauncher" in text


class TestPlugins:
    def test_every_kind_is_recognised(self):
        given = (OwnStrategy(), OwnPrecision(), OwnCheckpointIO(), OwnEnvironment(), OwnLauncher())
        parts = resolve(Request(plugins=given, devices=2), machine()).parts
        found = (
            parts.strategy_factory,
            parts.precision,
            parts.checkpoint_io,
            parts.environment,
            parts.launcher,
        )
        assert found == given

    def test_two_of_one_kind_conflict(self):
        text = refused(ConfigurationError, plugins=(OwnPrecision(), OwnPrecision()))
        assert "Two parts of the kind 'precision'" in text

    def test_argument_and_plugin_of_one_kind_conflict(self):
        text = refused(ConfigurationError, precision=16, plugins=(OwnPrecision(),))
        assert "by precision=16 and by plugins=[OwnPrecision(...)]" in text

    def test_unknown_type_is_named(self):
        assert "holds a builtins.object" in refused(ConfigurationError, plugins=(object(),))

    def test_class_is_refused_with_the_call(self):
        assert "OwnPrecision(...)" in refused(ConfigurationError, plugins=(OwnPrecision,))

    def test_name_is_refused(self):
        assert "strategy='ddp'" in refused(ConfigurationError, plugins=("ddp",))


class TestWants:
    bare = replace(ALL, features=frozenset(), hooks=frozenset())

    def test_missing_feature_names_the_argument(self):
        want = Want(Feature.CLIP_NORM, "gradient_clip_val=1.0")
        where = machine(backend(capabilities=self.bare))
        text = refused(UnsupportedError, where, wants=(want,), devices=1)
        assert "gradient_clip_val=1.0 needs 'clip-norm'" in text
        assert "accelerator: acme" in text

    def test_missing_hook_names_the_override(self):
        where = machine(backend(capabilities=self.bare))
        plan = plan_of(where=where, devices=1)
        want = Want(StepHook.AFTER_BACKWARD, "MyModule.on_after_backward")
        with pytest.raises(UnsupportedError, match=r"MyModule\.on_after_backward is called at"):
            check_wants(plan, [want])

    def test_several_missing_are_listed_together(self):
        plan = plan_of(where=machine(backend(capabilities=self.bare)), devices=1)
        wants = [Want(Feature.CLIP_NORM, "first=1"), Want(Feature.CLOSURE, "second=2")]
        with pytest.raises(ConfigurationError, match=r"(?s)1\. first=1.*2\. second=2"):
            check_wants(plan, wants)

    def test_what_is_there_passes(self):
        check_wants(plan_of(), [Want(Feature.CLIP_NORM, "x"), Want(StepHook.BEFORE_BACKWARD, "y")])

    def test_several_processes_need_the_feature(self):
        where = machine(backend(capabilities=self.bare))
        assert "The run has 2 processes" in refused(UnsupportedError, where, devices=2)

    def test_sync_batchnorm_needs_the_feature(self):
        can = replace(ALL, features=ALL.features - {Feature.SYNC_BATCHNORM})
        where = machine(backend(capabilities=can))
        text = refused(UnsupportedError, where, devices=2, sync_batchnorm=True)
        assert "sync_batchnorm=True" in text

    def test_sync_batchnorm_with_one_process_is_noticed(self):
        plan = plan_of(devices=1, sync_batchnorm=True)
        assert plan.sync_batchnorm is False
        assert plan.notices == ("sync_batchnorm=True has no effect with one process.",)


class TestWhole:
    def test_all_conflicts_are_listed_at_once(self):
        text = refused(
            ConfigurationError,
            devices=9,
            num_nodes=0,
            precision="17",
            strategy="ddq",
            launcher="spwan",
            plugins=(object(),),
        )
        assert text.startswith("6 settings cannot be met:")
        for part in ("devices=9", "num_nodes=0", "'17'", "'ddq'", "'spwan'", "builtins.object"):
            assert part in text

    def test_errors_quote_the_decisions_that_they_rest_on(self):
        text = refused(ConfigurationError, machine(HOST, backend()), devices=9)
        assert "accelerator: acme (asked by default; available, with the highest priority" in text
        assert "host: available, priority 0, 8 devices" in text

    def test_errors_pickle(self):
        with pytest.raises(ConfigurationError) as caught:
            resolve(Request(devices=9, num_nodes=0), machine())
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_the_same_input_gives_the_same_plan(self):
        where = machine(HOST, backend())
        assert plan_of(where=where) == plan_of(where=where)


def test_an_unknown_accelerator_does_not_hide_other_misspelled_names():
    request = Request(accelerator="nope", precision="fp7", launcher="scrpt")
    with pytest.raises(ConfigurationError) as caught:
        resolve(request, machine(backend()))
    text = str(caught.value)
    assert "nope" in text
    assert "fp7" in text
    assert "scrpt" in text
