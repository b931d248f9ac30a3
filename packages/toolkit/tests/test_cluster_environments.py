"""What SLURM, MPI, LSF and Kubeflow say about a process. Rules E1 to E14 of the contract.

The variables of SLURM, Open MPI and MPICH were written down from real ones (SLURM 22.05, Open MPI
4.1, MPICH 5.0), without those that nothing here could look at. Those of Kubeflow are what the code
of its operators puts into pods (Training Operator v1: ``pkg/controller.v1/pytorch/envvar.go``;
Trainer v2, commit 06b555d: ``pkg/runtime/framework/plugins/torch/torch.go``). Those of LSF are
described in IBM's reference, those of jsrun in public programs that read them. None of these was
recorded on a running system.
"""

from __future__ import annotations

import subprocess
import sys
import time
from types import MappingProxyType

import pytest
from drivetrain_interfaces.cluster import ClusterEnvironment, Machines, priority_of
from drivetrain_interfaces.errors import ClusterError

from drivetrain_toolkit.environments import (
    KUBEFLOW,
    LOCAL,
    LSF,
    MPI,
    SLURM,
    TORCHRUN,
    find_environment,
)
from drivetrain_toolkit.environments.torchrun import OWN_STORE

ALL = (KUBEFLOW, LOCAL, LSF, MPI, SLURM, TORCHRUN)


def variables(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.split())


#: Task 3 of ``sbatch -N2 --ntasks-per-node=2`` with an ``srun`` in the script, its second step.
TASK = variables(
    "SLURM_JOB_ID=1 SLURM_JOBID=1 SLURM_STEP_ID=1 SLURM_STEPID=1 SLURM_NTASKS=4 SLURM_NPROCS=4 "
    "SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=2 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=node[1-2] "
    "SLURM_STEP_NODELIST=node[1-2] SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=4 "
    "SLURM_STEP_TASKS_PER_NODE=2(x2) SLURM_TASKS_PER_NODE=2(x2) SLURM_JOB_NAME=b.sh "
    "SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1 SLURMD_NODENAME=node2 PMI_RANK=3 PMI_SIZE=4 "
    "PMI_JOBID=1.1 PMI_FD=13 SLURM_MPI_TYPE=pmi2 SLURM_LAUNCH_NODE_IPADDR=127.0.0.1"
)
#: The second task of ``srun --het-group=0,1`` in a job of one task on node1 and two on node2.
HETEROGENEOUS = variables(
    "SLURM_JOB_ID=2 SLURM_STEP_ID=0 SLURM_NTASKS=3 SLURM_STEP_NUM_TASKS=3 SLURM_NNODES=2 "
    "SLURM_STEP_TASKS_PER_NODE=1,2 SLURM_STEP_NODELIST=node[1-2] SLURM_JOB_NODELIST=node[1-2] "
    "SLURM_HET_SIZE=2 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NODEID=1 "
    "SLURM_JOB_NODELIST_HET_GROUP_0=node1 SLURM_NTASKS_HET_GROUP_1=2"
)
#: The batch script of ``sbatch -N2 --ntasks-per-node=2`` itself.
BATCH = variables(
    "SLURM_JOB_ID=1 SLURM_NTASKS=4 SLURM_NNODES=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 "
    "SLURM_TASKS_PER_NODE=2(x2) SLURM_JOB_NODELIST=node[1-2] SLURM_JOB_NAME=b.sh"
)
SALLOC = variables(
    "SLURM_JOB_ID=9 SLURM_NNODES=2 SLURM_TASKS_PER_NODE=1(x2) SLURM_JOB_NAME=interactive"
)
PTY = variables(
    "SLURM_JOB_ID=3 SLURM_JOB_NAME=bash SLURM_NNODES=1 SLURM_NTASKS=1 SLURM_PROCID=0 "
    "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1 SLURM_TASKS_PER_NODE=1"
)
OPEN_MPI = variables(
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 "
    "OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_NODE_RANK=1 OMPI_UNIVERSE_SIZE=2 "
    "OMPI_MCA_ess_base_jobid=471728129 OMPI_MCA_orte_num_nodes=1 PMIX_RANK=1 PMIX_HOSTNAME=vm "
    "PMIX_NAMESPACE=471728129"
)
HYDRA = variables(
    "HYDI_CONTROL_FD=7 MPI_LOCALNRANKS=2 MPI_LOCALRANKID=1 PMI_FD=11 PMI_HOSTNAME=vm PMI_RANK=1 "
    "PMI_SIZE=2"
)
JSRUN = variables(
    "LSB_JOBID=812 LSB_JOBINDEX=0 LSB_DJOB_NUMPROC=7 LSB_MCPU_HOSTS=? JSM_NAMESPACE_RANK=4 "
    "JSM_NAMESPACE_SIZE=6 JSM_NAMESPACE_LOCAL_RANK=1 JSM_NAMESPACE_LOCAL_SIZE=3 "
    "OMPI_COMM_WORLD_RANK=4 OMPI_COMM_WORLD_SIZE=6 OMPI_COMM_WORLD_LOCAL_RANK=1 "
    "OMPI_COMM_WORLD_LOCAL_SIZE=3 PMIX_RANK=4 HOSTNAME=g33n07"
) | {"LSB_MCPU_HOSTS": "batch2 1 g33n06 3 g33n07 3"}
POD = variables(
    "HOSTNAME=job-worker-0 KUBERNETES_SERVICE_HOST=10.96.0.1 KUBERNETES_SERVICE_PORT=443"
)
#: A worker of a PyTorchJob with a master and a worker, one process in each pod.
PYTORCHJOB = POD | variables(
    "MASTER_ADDR=job-master-0 MASTER_PORT=23456 RANK=1 WORLD_SIZE=2 PET_MASTER_ADDR=job-master-0 "
    "PET_MASTER_PORT=23456 PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=1 PYTHONUNBUFFERED=0"
)
#: The second pod of a TrainJob with two.
TRAINJOB = POD | variables(
    "PET_NNODES=2 PET_NPROC_PER_NODE=1 PET_NODE_RANK=1 PET_MASTER_ADDR=job-node-0-0.job "
    "PET_MASTER_PORT=29400"
)


def place(world):
    return world.rank, world.size, world.local_rank, world.local_size, world.node_rank


@pytest.mark.parametrize("environment", ALL)
def test_every_environment_satisfies_the_contract_and_changes_nothing(
    environment: ClusterEnvironment,
) -> None:
    """E1"""
    assert isinstance(environment, ClusterEnvironment)
    for env in (TASK, OPEN_MPI, HYDRA, JSRUN, PYTORCHJOB, TRAINJOB, {}):
        environment.detect(MappingProxyType(env))


def test_importing_them_loads_nothing_but_the_standard_library() -> None:
    """E1, E10"""
    code = """
import sys
import drivetrain_toolkit.environments
ours = ("drivetrain_toolkit", "drivetrain_interfaces")
foreign = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
foreign = {n for n in foreign if not n.startswith(("_", "drivetrain", "__editable__"))}
sys.exit(str(foreign) if foreign - {"sitecustomize", "distutils-precedence"} else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("env", [{}, TASK, OPEN_MPI, JSRUN, TRAINJOB])
def test_asking_all_of_them_takes_no_more_than_a_millisecond(env: dict[str, str]) -> None:
    """E14: the best of several tries, since the machine may be busy."""
    tries = []
    for _ in range(50):
        start = time.perf_counter()
        for environment in ALL:
            environment.detect(env)
        tries.append(time.perf_counter() - start)
    assert min(tries) <= 0.001


# SLURM


def test_a_task_of_a_step_is_a_rank() -> None:
    """E3, E9"""
    world = SLURM.world(TASK)
    assert place(world) == (3, 4, 1, 2, 1)
    assert (world.num_nodes, world.job, world.restarts) == (2, "1", 0)
    assert world.address == "node1"
    assert "SLURM_STEP_TASKS_PER_NODE=2(x2)" in world.evidence
    assert find_environment(TASK) is SLURM


def test_a_task_of_a_heterogeneous_job_counts_over_its_groups() -> None:
    world = SLURM.world(HETEROGENEOUS)
    assert place(world) == (1, 3, 0, 2, 1)
    assert (world.machines, world.address) == (2, "node1")


@pytest.mark.parametrize("env", [BATCH, SALLOC, PTY])
def test_who_was_not_started_by_srun_with_others_is_no_rank(env: dict[str, str]) -> None:
    """E9"""
    assert SLURM.detect(env) == ()
    assert find_environment(env) is None
    with pytest.raises(ClusterError, match="no task of a step with several tasks"):
        SLURM.world(env)


@pytest.mark.parametrize(("env", "count"), [(BATCH, 1), (SALLOC, 1), (PTY, 0), (TASK, 0), ({}, 0)])
def test_a_process_that_has_a_large_job_to_itself_is_told(env: dict[str, str], count: int) -> None:
    remarks = SLURM.remarks(env)
    assert len(remarks) == count
    assert all("Start the program with srun" in each for each in remarks)


@pytest.mark.parametrize("step", ["4294967290", "4294967291"])
def test_a_shell_on_a_node_is_no_step_of_the_user(step: str) -> None:
    """E9"""
    assert SLURM.detect({**TASK, "SLURM_STEP_ID": step}) == ()


def test_tasks_on_one_machine_meet_at_the_loopback() -> None:
    """E13"""
    env = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}
    assert SLURM.world(env).address == "127.0.0.1"


def test_the_users_address_and_port_count_first_then_a_reserved_port() -> None:
    """E13"""
    own = SLURM.world({**TASK, "MASTER_ADDR": "[fd00::7]", "MASTER_PORT": "4711"})
    assert (own.address, own.port) == ("fd00::7", 4711)
    assert SLURM.world({**TASK, "SLURM_STEP_RESV_PORTS": "12007-12008"}).port == 12007
    steps = {SLURM.world({**TASK, "SLURM_STEP_ID": str(step)}).port for step in range(8)}
    assert len(steps) == 8


def test_a_task_of_an_array_is_named_by_the_array() -> None:
    env = {**TASK, "SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    assert SLURM.world(env).job == "6_2"


def test_a_requeued_job_tells_how_often() -> None:
    again = SLURM.world({**TASK, "SLURM_RESTART_COUNT": "2"})
    assert again.restarts == 2
    assert again.port != SLURM.world(TASK).port, "the old port may still be taken"


@pytest.mark.parametrize(
    ("env", "apart"),
    [
        ({"SLURMD_TRES_BIND": "gpu:per_task:1", "SLURM_STEP_GPUS": "1"}, True),
        ({"SLURM_GPUS_PER_TASK": "1"}, True),
        ({"SLURM_STEP_GPUS": "0,1", "SLURM_GPUS_ON_NODE": "2"}, False),
    ],
)
def test_gpus_per_task_are_seen_by_their_task_alone(env: dict[str, str], *, apart: bool) -> None:
    assert SLURM.world({**TASK, **env}).devices_apart is apart


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "SLURM_STEP_NUM_TASKS=4, and.* counts 6"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4 is outside SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is outside"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 is outside the 2 tasks of node 1"),
        ({"SLURM_STEP_NODELIST": "node[1-"}, "SLURM_STEP_NODELIST=node.* cannot be read"),
        ({"SLURM_STEP_TASKS_PER_NODE": "x"}, "cannot be read: 'x' is no whole number"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        ({"RANK": "0"}, "rank 3 of 4 .*RANK=0 is set too"),
        ({"WORLD_SIZE": "8", "RANK": "3"}, "WORLD_SIZE=8 is set too"),
    ],
)
def test_contradictions_of_slurm_quote_both_facts(changes: dict[str, str], facts: str) -> None:
    """E5"""
    with pytest.raises(ClusterError, match=facts):
        SLURM.world({**TASK, **changes})


def test_insisting_on_an_environment_settles_a_contradiction_with_hand_set_variables() -> None:
    """E8"""
    env = {**TASK, "RANK": "0", "DRIVETRAIN_CLUSTER": "slurm"}
    assert SLURM.world(env).rank == 3


# torchrun


def test_torchrun_tells_run_restarts_and_machines() -> None:
    """E6"""
    env = variables(
        "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 GROUP_WORLD_SIZE=2 "
        "MASTER_ADDR=hosta MASTER_PORT=35633 TORCHELASTIC_RESTART_COUNT=1 "
        "TORCHELASTIC_MAX_RESTARTS=3 TORCHELASTIC_RUN_ID=j1"
    )
    world = TORCHRUN.world(env)
    assert place(world) == (3, 4, 1, 2, 1)
    assert (world.job, world.restarts, world.max_restarts, world.num_nodes) == ("j1", 1, 3, 2)
    (remark,) = TORCHRUN.remarks(env)
    assert f"set {OWN_STORE}=1 in torchrun's own environment" in remark
    assert TORCHRUN.remarks({**env, OWN_STORE: "1"}) == ()
    assert TORCHRUN.remarks({**env, "TORCHELASTIC_MAX_RESTARTS": "0"}) == ()


# MPI


@pytest.mark.parametrize("env", [OPEN_MPI, {**HYDRA, "MASTER_PORT": "4711"}])
def test_ranks_of_mpi_on_one_machine_need_no_address(env: dict[str, str]) -> None:
    """E10, E13"""
    world = MPI.world(env)
    assert place(world) == (1, 2, 1, 2, 0)
    assert world.address == "127.0.0.1"
    assert find_environment(env) is MPI


def test_ranks_of_one_mpirun_get_one_port_and_those_of_another_another() -> None:
    """E13"""
    other = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert MPI.world(OPEN_MPI).port == MPI.world(other).port
    assert MPI.world(OPEN_MPI).port != MPI.world({**OPEN_MPI, "PMIX_NAMESPACE": "5"}).port


def test_ranks_of_hydra_without_a_port_are_refused_where_hydra_cannot_be_found() -> None:
    with pytest.raises(ClusterError, match="nothing tells a port"):
        MPI.world(HYDRA)


@pytest.mark.parametrize(
    ("rank", "local_rank", "machine"), [(0, 0, 0), (3, 1, 1), (2, 1, 0), (1, 0, 1)]
)
def test_the_machine_follows_from_blocks_and_from_dealing_out(
    rank: int, local_rank: int, machine: int
) -> None:
    env = {
        **OPEN_MPI,
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": "a",
    }
    assert MPI.world(env).node_rank == machine


def test_ranks_on_several_machines_need_to_know_where_the_first_is() -> None:
    """E4"""
    env = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ClusterError, match="nothing tells where rank 0 is"):
        MPI.world(env)
    inside = {**env, "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_ID": "7"}
    assert MPI.world(inside).address == "node3"


def test_pmi_rank_alone_is_no_sign_of_mpi() -> None:
    """E10"""
    assert MPI.detect({"PMI_RANK": "0", "PMI_SIZE": "2"}) == ()
    assert MPI.detect(TASK) == ()


# LSF


def test_jsrun_is_read_with_the_hosts_of_the_job(tmp_path) -> None:
    """E11"""
    ranks = tmp_path / "ranks"
    ranks.write_text("batch2\n" + "g33n06\n" * 3 + "g33n07\n" * 3, encoding="utf-8")
    for env in (JSRUN, {**JSRUN, "LSB_DJOB_RANKFILE": str(ranks), "LSB_MCPU_HOSTS": ""}):
        world = LSF.world(env)
        assert place(world) == (4, 6, 1, 3, 1)
        assert (world.address, world.job, world.restarts) == ("g33n06", "812", 0)
    assert find_environment(JSRUN) is LSF


def test_the_own_host_is_known_by_its_full_name_too() -> None:
    assert LSF.world({**JSRUN, "HOSTNAME": "g33n07.cluster.example"}).node_rank == 1


def test_a_job_without_a_launch_node_keeps_its_first_host() -> None:
    env = {**JSRUN, "LSB_MCPU_HOSTS": "g33n06 3 g33n07 3"}
    assert LSF.world(env).address == "g33n06"


def test_a_rank_file_that_cannot_be_read_is_an_error_with_its_path() -> None:
    with pytest.raises(ClusterError, match="LSB_DJOB_RANKFILE=/nowhere/ranks cannot be read"):
        LSF.world({**JSRUN, "LSB_DJOB_RANKFILE": "/nowhere/ranks"})


def test_unknown_hosts_are_an_error() -> None:
    """E4"""
    with pytest.raises(ClusterError, match="names the hosts of the job"):
        LSF.world({**JSRUN, "LSB_MCPU_HOSTS": ""})


def test_an_element_of_an_array_and_a_job_started_again_say_so() -> None:
    world = LSF.world({**JSRUN, "LSB_JOBINDEX": "3", "LSB_RESTART": "Y"})
    assert (world.job, world.restarts) == ("812[3]", 1)
    assert world.port != LSF.world(JSRUN).port


def test_bsub_alone_makes_no_ranks_and_says_so() -> None:
    env = variables("LSB_JOBID=5 LSB_DJOB_NUMPROC=8 LSB_INTERACTIVE=Y")
    assert find_environment(env) is None
    (remark,) = LSF.remarks(env)
    assert "LSB_DJOB_NUMPROC=8" in remark
    assert LSF.remarks(JSRUN) == ()


# Kubeflow


@pytest.mark.parametrize(
    ("env", "address"), [(PYTORCHJOB, "job-master-0"), (TRAINJOB, "job-node-0-0.job")]
)
def test_the_only_process_of_a_pod_is_a_rank(env: dict[str, str], address: str) -> None:
    """E12"""
    world = KUBEFLOW.world(env)
    assert place(world) == (1, 2, 0, 1, 1)
    assert (world.address, world.num_nodes) == (address, 2)
    assert find_environment(env) is KUBEFLOW
    assert KUBEFLOW.machines(env) is None


def test_a_pytorchjob_is_read_without_the_newer_variables() -> None:
    env = {name: value for name, value in PYTORCHJOB.items() if not name.startswith("PET_")}
    assert place(KUBEFLOW.world(env)) == (1, 2, 0, 1, 1)


def test_several_processes_of_a_pod_are_counted_by_their_local_rank() -> None:
    """E12"""
    env = {**TRAINJOB, "PET_NPROC_PER_NODE": "4", "LOCAL_RANK": "2"}
    assert place(KUBEFLOW.world(env)) == (6, 8, 2, 4, 1)


@pytest.mark.parametrize(("told", "local_size"), [("4", 4), ("gpu", 0), ("auto", 0)])
def test_a_pod_that_should_have_several_processes_is_described(told: str, local_size: int) -> None:
    """E12"""
    env = {**TRAINJOB, "PET_NPROC_PER_NODE": told}
    assert KUBEFLOW.detect(env) == ()
    assert LOCAL.detect(env) == ()
    machines = KUBEFLOW.machines(env)
    assert isinstance(machines, Machines)
    assert (machines.num_nodes, machines.node_rank, machines.local_size) == (2, 1, local_size)
    assert (machines.address, machines.port) == ("job-node-0-0.job", 29400)


def test_a_pytorchjob_that_names_no_number_of_processes_has_pods_only() -> None:
    """E12: the operator says "auto", and counts one process a pod in ``WORLD_SIZE``."""
    env = {**PYTORCHJOB, "PET_NPROC_PER_NODE": "auto"}
    assert find_environment(env) is None
    machines = KUBEFLOW.machines(env)
    assert machines is not None
    assert (machines.num_nodes, machines.node_rank, machines.local_size) == (2, 1, 0)
    assert (machines.address, machines.port) == ("job-master-0", 23456)


def test_the_pods_of_a_pytorchjob_are_not_taken_for_ranks() -> None:
    """E12: ``RANK`` is that of the pod, and ``WORLD_SIZE`` counts processes."""
    env = {**PYTORCHJOB, "PET_NPROC_PER_NODE": "2", "WORLD_SIZE": "4"}
    assert find_environment(env) is None
    machines = KUBEFLOW.machines(env)
    assert machines is not None
    assert (machines.num_nodes, machines.local_size, machines.node_rank) == (2, 2, 1)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"PET_NODE_RANK": "2"}, "pod 2 is outside 2 pods"),
        ({"PET_NNODES": "1:4"}, "only torchrun can follow"),
        ({"PET_NNODES": "two"}, "PET_NNODES='two'"),
        ({"PET_NPROC_PER_NODE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK=2 is outside the 2"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE=3, and 2 pods with 1 processes each make 2"),
    ],
)
def test_contradictions_of_pods_quote_both_facts(changes: dict[str, str], facts: str) -> None:
    """E5"""
    with pytest.raises(ClusterError, match=facts):
        KUBEFLOW.world({**TRAINJOB, **changes})


def test_torchrun_in_a_pod_is_torchruns_affair() -> None:
    env = {**TRAINJOB, "TORCHELASTIC_RUN_ID": "j", "LOCAL_RANK": "0"}
    assert KUBEFLOW.detect(env) == ()
    assert KUBEFLOW.machines(env) is None


# Order


def test_what_runs_inside_a_job_goes_before_the_manager_of_the_job() -> None:
    """E8"""
    order = sorted(ALL, key=priority_of, reverse=True)
    assert [each.name for each in order] == ["torchrun", "lsf", "mpi", "slurm", "kubeflow", "local"]
    assert priority_of(object()) == 50
