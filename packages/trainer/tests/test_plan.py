"""A plan is plain data: it pickles and prints. Surveying reads, and changes nothing."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib import metadata

import pytest
from drivetrain_interfaces.accelerator import DeviceFacts
from drivetrain_interfaces.backend import BackendSpec, Probe
from drivetrain_interfaces.capabilities import Capabilities, Feature
from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.contract import CONTRACT, ContractVersion
from drivetrain_interfaces.discovery import registrations
from drivetrain_interfaces.errors import ClusterError, ContractMismatchError, NotFoundError

from drivetrain.plan import Candidate, Decision, Plan, Request
from drivetrain.resolve import resolve
from drivetrain.survey import find_cluster, survey

PLAN = Plan(
    backend="acme",
    owner="drivetrain-acme 1.2",
    devices=(0, 1),
    num_nodes=1,
    world_size=2,
    local_size=2,
    strategy="ddp",
    precision="32-true",
    launcher="script",
    environment="local",
    sync_batchnorm=False,
    capabilities=Capabilities(frozenset({Feature.CLIP_NORM}), frozenset({"32-true"})),
    options=(("find_unused_parameters", True),),
    record=(
        Decision("accelerator", "acme", "default", ("it is there",), (Candidate("acme", "yes"),)),
        Decision("devices", "0, 1", "devices=2"),
    ),
    notices=("Something to know.",),
)


def test_plan_pickles():
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


def test_explain_has_a_block_for_each_decision():
    blocks = PLAN.explain().split("\n\n")
    assert blocks[0].startswith("plan: ddp on acme (drivetrain-acme 1.2), devices 0, 1, 2 proc")
    assert blocks[1].splitlines() == [
        "accelerator: acme",
        "  asked by: default",
        "  because: it is there",
        "  considered: acme - yes",
    ]
    assert blocks[2].splitlines() == ["devices: 0, 1", "  asked by: devices=2"]
    assert blocks[3] == "notice: Something to know."


def test_json_holds_everything():
    plain = json.loads(PLAN.to_json())
    assert plain["devices"] == [0, 1]
    assert plain["options"] == {"find_unused_parameters": True}
    assert plain["capabilities"]["features"] == ["clip-norm"]
    assert plain["record"][0]["candidates"] == [{"name": "acme", "verdict": "yes"}]


def test_decision_is_found_by_name():
    assert PLAN.decision("devices").asked_by == "devices=2"
    with pytest.raises(KeyError, match="weather"):
        PLAN.decision("weather")


# Surveying. Environments that the tests make up are found through entry points like real ones.


class Fake:
    def __init__(self, name, variable, priority=50):
        self.name = name
        self.priority = priority
        self.variable = variable

    def detect(self, env):
        return (f"{self.variable}={env[self.variable]}",) if self.variable in env else ()

    def world(self, env):
        size = int(env[self.variable])
        return World(0, size, 0, size, 0, "here", 1, environment=self.name)


class Falling(Fake):
    def detect(self, env):
        raise RuntimeError("boom")


@pytest.fixture
def claims(monkeypatch):
    """Environments by name, loaded from a module made up for the test."""
    made = type(sys)("made_up_environments")
    made.local = Fake("local", "PLACE", 0)
    made.torchrun = Fake("torchrun", "ELASTIC", 90)
    made.batch = Fake("batch", "BATCH")
    del made.batch.priority  # stating none is allowed, and means the middle
    made.falling = Falling("falling", "BATCH")
    monkeypatch.setitem(sys.modules, "made_up_environments", made)
    return registrations(
        "drivetrain.environments",
        [
            metadata.EntryPoint(name, f"made_up_environments:{name}", "drivetrain.environments")
            for name in ("batch", "falling", "local", "torchrun")
        ],
    )


def test_no_evidence_means_a_world_of_our_own(claims):
    finding = find_cluster({}, claims)
    assert (finding.world, finding.environment, finding.problem) == (None, "local", None)
    assert [one.name for one in finding.candidates] == ["torchrun", "batch", "falling", "local"]


def test_torchrun_comes_before_the_manager_that_it_runs_in_and_local_last(claims):
    finding = find_cluster({"ELASTIC": "2", "BATCH": "1", "PLACE": "3"}, claims)
    assert finding.environment == "torchrun"
    assert finding.world.size == 2
    assert finding.evidence == ("ELASTIC=2",)
    verdicts = {one.name: one.verdict for one in finding.candidates}
    assert verdicts["batch"] == "evidence BATCH=1, but comes later"
    assert find_cluster({"BATCH": "1", "PLACE": "3"}, claims).environment == "batch"


def test_an_environment_that_raises_is_one_line_of_the_record(claims):
    finding = find_cluster({"PLACE": "1"}, claims)
    assert finding.environment == "local"
    verdicts = {one.name: one.verdict for one in finding.candidates}
    assert "raised RuntimeError: boom" in verdicts["falling"]


def test_detection_can_be_switched_off(claims):
    finding = find_cluster({"ELASTIC": "2", "DRIVETRAIN_CLUSTER": "none"}, claims)
    assert finding.world is None
    assert finding.asked_by == "DRIVETRAIN_CLUSTER=none"


def test_detection_can_be_forced(claims):
    env = {"ELASTIC": "2", "BATCH": "1", "DRIVETRAIN_CLUSTER": "batch"}
    assert find_cluster(env, claims).environment == "batch"


def test_forcing_without_evidence_is_an_error(claims):
    problem = find_cluster({"DRIVETRAIN_CLUSTER": "batch"}, claims).problem
    assert isinstance(problem, ClusterError)
    assert "nothing shows that 'batch' started this process" in str(problem)


def test_forcing_an_unknown_one_suggests_the_nearest(claims):
    problem = find_cluster({"DRIVETRAIN_CLUSTER": "bach"}, claims).problem
    assert isinstance(problem, NotFoundError)
    assert "Use 'batch'" in str(problem)


def test_switch_and_argument_may_not_contradict(claims):
    problem = find_cluster({"DRIVETRAIN_CLUSTER": "none"}, claims, "batch").problem
    assert "cluster_environment='batch'" in str(problem)
    assert "'none'" in str(problem)


def test_the_switch_does_not_hide_what_our_own_launcher_started(claims):
    env = {"DRIVETRAIN_CLUSTER": "none", "DRIVETRAIN_LAUNCHED": "script", "PLACE": "2"}
    assert find_cluster(env, claims).world.size == 2


def test_variables_that_make_no_world_are_a_problem_that_quotes_them(claims):
    problem = find_cluster({"BATCH": "zero"}, claims).problem
    assert isinstance(problem, ClusterError)
    assert "BATCH=zero" in str(problem)


def test_own_environment_object_is_asked_alone(claims):
    finding = find_cluster({"MINE": "2", "ELASTIC": "4"}, claims, Fake("mine", "MINE"))
    assert (finding.environment, finding.world.size) == ("mine", 2)


def spec(contract=CONTRACT):
    return BackendSpec(
        name="acme",
        contract=contract,
        capabilities=Capabilities(precisions=frozenset({"32-true"})),
        facts=DeviceFacts("acme", "gloo", "acme"),
        strategies=("single_device",),
        probe=lambda: Probe(1),
        load=lambda: None,
    )


def test_a_spec_object_is_probed_and_resolves():
    request = Request(accelerator=spec())
    plan = resolve(request, survey(request, {})).plan
    assert (plan.backend, plan.launcher) == ("acme", "none")


def test_a_spec_object_of_another_contract_is_refused():
    request = Request(accelerator=spec(ContractVersion(99, 0)))
    with pytest.raises(ContractMismatchError, match=r"acme was written for contract 99\.0"):
        resolve(request, survey(request, {}))


def test_survey_reads_the_meeting_point():
    env = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    found = survey(Request(accelerator=spec()), env)
    assert (found.node_rank, found.address, found.port) == (1, "10.0.0.1", 29500)


def test_planning_loads_no_torch(tmp_path):
    code = (
        "import sys, drivetrain.resolve, drivetrain.survey, drivetrain.plan\n"
        "from drivetrain.plan import Request\n"
        "drivetrain.survey.survey(Request(), {})\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
