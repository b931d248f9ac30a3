"""On two hosts that a cable joins: torchrun on each, and machines that only variables describe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
EQUAL = str(HERE / "ddp_equal.py")


def _both(two_hosts, folder, words_of, env):
    """Run a command on each host at the same time; what each printed."""
    started = [
        subprocess.Popen(
            two_hosts.on(host, *words_of(number, host)),
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, host in enumerate(("hosta", "hostb"))
    ]
    try:
        said = [each.communicate(timeout=250) for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    for each, (_, errors) in zip(started, said, strict=True):
        assert each.returncode == 0, errors
    return "".join(out for out, _ in said)


def _same(found, alone):
    for ours, theirs in zip(found["weights"], alone, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))


def test_torchrun_on_two_hosts_trains_as_one_process_does(
    two_hosts, tmp_path, values, alone, clean_variables
):
    def words(number, host):
        run = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
        meet = ("--rdzv-backend=c10d", "--rdzv-endpoint=hosta:29400", "--rdzv-id=j")
        return (*run, *meet, EQUAL)

    env = {**clean_variables, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    (found,) = values(_both(two_hosts, tmp_path, words, env))
    assert (found["size"], found["environment"]) == (2, "torchrun")
    _same(found, alone)


@pytest.mark.slow
def test_the_script_launcher_of_two_machines_trains_as_one_process_does(
    two_hosts, tmp_path, values, alone, clean_variables
):
    settings = json.dumps({"devices": 2, "num_nodes": 2})

    def words(number, host):
        place = (f"NODE_RANK={number}", "MASTER_ADDR=hosta", "MASTER_PORT=29500")
        return ("env", *place, sys.executable, EQUAL, settings)

    (found,) = values(_both(two_hosts, tmp_path, words, clean_variables))
    assert (found["size"], found["environment"]) == (4, "local")
    _same(found, alone)


@pytest.mark.slow
def test_the_pods_of_a_trainjob_start_their_processes_and_train_as_one_does(
    two_hosts, tmp_path, values, alone, clean_variables
):
    """Hosts for pods, with the variables that the operator sets; two processes in each."""

    def words(number, host):
        pod = ("PET_NNODES=2", "PET_NPROC_PER_NODE=2", f"PET_NODE_RANK={number}")
        meet = ("PET_MASTER_ADDR=hosta", "PET_MASTER_PORT=29400", f"HOSTNAME={host}")
        return ("env", *pod, *meet, sys.executable, EQUAL)

    (found,) = values(_both(two_hosts, tmp_path, words, clean_variables))
    assert (found["size"], found["environment"]) == (4, "local"), "launched by the trainer"
    _same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["hosta", "[fd77::254]"])
def test_hosts_that_have_addresses_of_ipv6_only_train_as_one_process_does(
    hosts_of, tmp_path, values, alone, clean_variables, address
):
    settings = json.dumps({"devices": 1, "num_nodes": 2})

    def words(number, host):
        place = (f"NODE_RANK={number}", f"MASTER_ADDR={address}", "MASTER_PORT=29500")
        return ("env", *place, sys.executable, EQUAL, settings)

    (found,) = values(_both(hosts_of(six=True), tmp_path, words, clean_variables))
    assert found["size"] == 2
    _same(found, alone)


@pytest.mark.slow
def test_where_a_hosts_name_leads_to_the_wrong_interface_the_right_one_can_be_named(
    hosts_of, tmp_path, values, alone, clean_variables
):
    hosts = hosts_of(apart=True)
    settings = json.dumps({"devices": 1, "num_nodes": 2})

    def words(number, host):
        place = (f"NODE_RANK={number}", f"MASTER_ADDR={hosts.addresses['hosta']}")
        meet = ("MASTER_PORT=29500", f"GLOO_SOCKET_IFNAME={('br0', 'eth0')[number]}")
        return ("env", *place, *meet, sys.executable, EQUAL, settings)

    (found,) = values(_both(hosts, tmp_path, words, clean_variables))
    assert found["size"] == 2
    _same(found, alone)


@pytest.mark.slow
def test_ranks_meet_at_an_ipv6_address(run, tmp_path, values, alone, clean_variables):
    address = run(["sh", "-c", "cat /proc/net/if_inet6"], tmp_path, good=False).stdout
    if "00000000000000000000000000000001" not in address:
        pytest.skip("this machine has no loopback of IPv6")
    both = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        meet = {"MASTER_ADDR": "[::1]", "MASTER_PORT": 29512}
        words = [f"{name}={value}" for name, value in {**place, **meet}.items()]
        both.append(
            subprocess.Popen(
                ["env", *words, sys.executable, EQUAL],
                cwd=tmp_path,
                env=clean_variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = "".join(each.communicate(timeout=250)[0] for each in both)
    assert [each.returncode for each in both] == [0, 0]
    (found,) = values(said)
    assert found["size"] == 2
    _same(found, alone)
