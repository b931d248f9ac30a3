"""Who a process on a TPU machine is, from recorded variables.

``GKE`` is what the webhook of the KubeRay TPU operator injects: hosts are
``<worker group>-<number>.<headless service>`` (ray-on-gke/tpu/kuberay-tpu-webhook in
GoogleCloudPlatform/ai-on-gke). ``ONE`` is a TPU machine of a notebook service (v3-8), whose host
is ``localhost``. ``RANK`` is what ``configure_topology`` of torch_xla 2.9.0
(``torch_xla/_internal/tpu.py``) sets for process 1 of 4 on worker 1 of a v4-16.
"""

from __future__ import annotations

import pytest
from drivetrain_interfaces import ClusterEnvironment, ClusterError, DescribesMachines
from drivetrain_interfaces.discovery import ENVIRONMENTS, registrations

from drivetrain_xla.environment import TPU

GKE = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "tpu-group-0.headless-svc,tpu-group-1.headless-svc",
}
ONE = {
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "TPU_SKIP_MDS_QUERY": "1",
}
RANK = {
    "PJRT_LOCAL_PROCESS_RANK": "1",
    "PJRT_LOCAL_PROCESS_COUNT": "4",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    "TPU_PROCESS_BOUNDS": "2,2,2",
    "CLOUD_TPU_TASK_ID": "5",
    "TPU_PROCESS_ADDRESSES": ",".join(
        f"{host}:{port}" for host in ("10.0.0.2", "10.0.0.3") for port in range(8476, 8480)
    ),
    "TPU_VISIBLE_CHIPS": "1",
    "TPU_PROCESS_PORT": "8477",
}


def test_it_is_registered_and_keeps_the_contract():
    assert registrations(ENVIRONMENTS)["tpu"]
    assert isinstance(TPU, ClusterEnvironment)
    assert isinstance(TPU, DescribesMachines)


def test_a_machine_of_a_slice_is_no_rank_and_knows_the_others():
    assert TPU.detect(GKE) == ()
    machines = TPU.machines(GKE)
    assert (machines.num_nodes, machines.node_rank, machines.local_size) == (2, 1, 0)
    assert (machines.address, machines.port) == ("tpu-group-0.headless-svc", 12355)
    assert machines.evidence == tuple(f"{name}={value}" for name, value in GKE.items())


def test_a_single_machine_is_nothing_special():
    for env in ({}, ONE, {"TPU_WORKER_ID": "0"}):
        assert TPU.detect(env) == ()
        assert TPU.machines(env) is None


def test_a_process_with_a_chip_of_its_own_is_a_rank():
    world = TPU.world(RANK)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert (world.node_rank, world.num_nodes, world.address) == (1, 2, "10.0.0.2")
    assert world.environment == "tpu"
    assert "CLOUD_TPU_TASK_ID=5" in world.evidence
    assert TPU.machines(RANK | GKE) is None


def test_ranks_of_one_machine_meet_at_the_loopback():
    addresses = ",".join(f"localhost:{port}" for port in range(8476, 8480))
    world = TPU.world(RANK | {"CLOUD_TPU_TASK_ID": "1", "TPU_PROCESS_ADDRESSES": addresses})
    assert (world.rank, world.size, world.address) == (1, 4, "127.0.0.1")


def test_what_the_user_says_of_the_meeting_point_counts():
    told = {"MASTER_ADDR": "head", "MASTER_PORT": "4000"}
    assert (TPU.world(RANK | told).address, TPU.world(RANK | told).port) == ("head", 4000)
    machines = TPU.machines(GKE | told)
    assert (machines.address, machines.port) == ("head", 4000)


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"CLOUD_TPU_TASK_ID": "8"}, "process 8"),
        ({"CLOUD_TPU_TASK_ID": "4"}, "process 4"),
        ({"CLOUD_TPU_TASK_ID": "one"}, "CLOUD_TPU_TASK_ID='one' is not a whole number"),
        ({"PJRT_LOCAL_PROCESS_COUNT": "3"}, "number 1 of 3"),
        ({"TPU_PROCESS_ADDRESSES": ""}, "TPU_PROCESS_ADDRESSES is not set"),
    ],
)
def test_contradictions_of_a_process_are_errors(env, text):
    with pytest.raises(ClusterError, match=text):
        TPU.world(RANK | env)


def test_contradictions_of_a_machine_are_errors():
    with pytest.raises(ClusterError, match="TPU_WORKER_ID=2 is none of the 2 machines"):
        TPU.machines(GKE | {"TPU_WORKER_ID": "2"})
    with pytest.raises(ClusterError, match="TPU_WORKER_ID is not set"):
        TPU.machines({"TPU_WORKER_HOSTNAMES": "a,b"})
