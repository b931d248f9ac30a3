"""Who goes first among cluster environments: every row of the table in docs/environments.md."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from drivetrain import Trainer
from drivetrain.survey import find_cluster
from drivetrain_interfaces import ClusterError
from drivetrain_interfaces.discovery import ENVIRONMENTS, registrations
from drivetrain_toolkit.environments import find_environment

PAGE = Path(__file__).parents[1] / "docs" / "environments.md"


def rows():
    """Situation, variables and choice of each row."""
    section = PAGE.read_text(encoding="utf-8").split("## Who goes first")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ][2:]
    return [
        pytest.param(
            dict(item.split("=", 1) for item in re.findall(r"`(.*)`", told)[0].split()),
            chosen,
            id=situation.replace("`", ""),
        )
        for situation, told, chosen in cells
    ]


@pytest.mark.parametrize(("env", "chosen"), rows())
def test_a_row_of_the_table(env, chosen):
    found = find_environment(env)
    assert (found.name if found else "none") == chosen
    finding = find_cluster(env, registrations(ENVIRONMENTS))
    if chosen == "none":
        assert finding.world is None
        assert finding.problem is None
    else:
        assert finding.environment == chosen, finding


def test_asking_all_that_are_installed_takes_no_more_than_a_millisecond():
    """The best of several tries, since the machine may be busy."""
    claims = registrations(ENVIRONMENTS)
    assert {"kubeflow", "local", "lsf", "mpi", "slurm", "torchrun"} <= set(claims)
    tries = []
    for _ in range(30):
        start = time.perf_counter()
        find_cluster({"HOME": "/root"}, claims)
        tries.append(time.perf_counter() - start)
    assert min(tries) <= 0.001


SLURM_TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
}
TRAINJOB = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}


@pytest.fixture
def variables(monkeypatch):
    def put(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"devices": 4, "num_nodes": 2}, ("makes 8 processes", "slurm started 4")),
        ({"devices": 2}, ("makes 2 processes", "slurm started 4")),
        ({"num_nodes": 4}, ("num_nodes=4", "slurm started 4")),
        ({"devices": 1, "num_nodes": 4}, ("num_nodes=4", "slurm started 4")),
    ],
)
def test_settings_that_contradict_the_scheduler_are_refused_at_construction(
    variables, settings, both
):
    variables(**SLURM_TASK)
    with pytest.raises(Exception, match="DT20") as caught:
        Trainer(accelerator="cpu", **settings)
    assert all(fact in str(caught.value) for fact in (*both, "SLURM_STEP_NUM_TASKS=4"))


def test_settings_that_agree_with_the_scheduler_and_none_at_all_are_the_same(variables):
    variables(**SLURM_TASK)
    for settings in ({}, {"devices": 2, "num_nodes": 2}):
        plan = Trainer(accelerator="cpu", **settings).runtime.plan
        assert (plan.world_size, plan.local_size, plan.num_nodes) == (4, 2, 2)
        assert (plan.launcher, plan.environment) == ("attach", "slurm")


def test_the_switch_makes_a_task_a_run_of_its_own(variables):
    variables(**SLURM_TASK, DRIVETRAIN_CLUSTER="none")
    assert Trainer(accelerator="cpu").runtime.plan.world_size == 1


def test_a_pod_for_several_processes_starts_them_itself(variables):
    variables(**TRAINJOB)
    plan = Trainer(accelerator="cpu").runtime.plan
    assert (plan.num_nodes, plan.local_size, plan.world_size) == (2, 2, 4)
    assert (plan.launcher, plan.node_rank) == ("script", 1)
    assert (plan.address, plan.port) == ("job-node-0-0.job", 29400)
    assert plan.environment == "kubeflow"


@pytest.mark.parametrize("settings", [{"devices": 1}, {"num_nodes": 3}])
def test_settings_that_contradict_the_pods_are_refused(variables, settings):
    variables(**TRAINJOB)
    with pytest.raises(Exception, match="DT20") as caught:
        Trainer(accelerator="cpu", **settings)
    assert "PET_NNODES=2" in str(caught.value)


def test_a_batch_script_without_srun_is_told_and_waits_for_nobody(variables):
    variables(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NNODES="2", SLURM_NTASKS="4")
    plan = Trainer(accelerator="cpu").runtime.plan
    assert plan.world_size == 1
    assert any("Start the program with srun" in notice for notice in plan.notices)


def test_a_task_that_sees_its_own_devices_only_takes_the_first(variables):
    variables(**SLURM_TASK, SLURMD_TRES_BIND="gpu:per_task:1")
    plan = Trainer(accelerator="cpu", devices=2, num_nodes=2).runtime.plan
    assert (plan.devices, plan.local_size, plan.world_size) == ((0,), 2, 4)
    with pytest.raises(ClusterError, match=r"devices=3 .*each of which sees its own"):
        Trainer(accelerator="cpu", devices=3, num_nodes=2)
