"""The place of a process, read from variables. Rules E1 to E8 of docs/contracts/cluster.md."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from types import MappingProxyType

import pytest
from drivetrain_interfaces.cluster import ClusterEnvironment, World
from drivetrain_interfaces.errors import ClusterError, DrivetrainError, NotFoundError

from drivetrain_toolkit.environments import LOCAL, TORCHRUN, find_environment

LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "NODE_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
ELASTIC = {
    **{name: value for name, value in LAUNCHED.items() if name != "NODE_RANK"},
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


@pytest.mark.parametrize("environment", [LOCAL, TORCHRUN])
def test_an_environment_satisfies_the_contract(environment: ClusterEnvironment) -> None:
    assert isinstance(environment, ClusterEnvironment)


def test_importing_environments_loads_no_torch() -> None:
    """E1"""
    code = "import sys, drivetrain_toolkit.environments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_local_reads_every_field_and_keeps_the_facts() -> None:
    """E3, E7"""
    world = LOCAL.world(MappingProxyType({**LAUNCHED, "DRIVETRAIN_LAUNCHED": "script"}))
    assert world == World(
        rank=3,
        size=4,
        local_rank=1,
        local_size=2,
        node_rank=1,
        address="10.0.0.1",
        port=29500,
        environment="local",
        evidence=(
            "RANK=3",
            "WORLD_SIZE=4",
            "LOCAL_RANK=1",
            "LOCAL_WORLD_SIZE=2",
            "NODE_RANK=1",
            "MASTER_ADDR=10.0.0.1",
            "MASTER_PORT=29500",
            "DRIVETRAIN_LAUNCHED=script",
        ),
    )


def test_no_variables_are_a_world_of_one_without_evidence() -> None:
    """E2"""
    assert LOCAL.detect({}) == ()
    assert LOCAL.world({}) == World()


@pytest.mark.parametrize(
    "env", [{"MASTER_ADDR": "host", "MASTER_PORT": "1"}, {"NODE_RANK": "1"}, {"RANK": ""}]
)
def test_facts_about_a_machine_are_no_evidence_of_ranks(env: dict[str, str]) -> None:
    """E2"""
    assert LOCAL.detect(env) == ()
    assert LOCAL.world(env).size == 1


def test_a_world_of_one_needs_no_more_than_its_size() -> None:
    """E4"""
    world = LOCAL.world({"WORLD_SIZE": "1"})
    assert (world.rank, world.size, world.local_size, world.address) == (0, 1, 1, "")
    assert world.evidence == ("WORLD_SIZE=1",)


def test_the_machine_number_follows_from_the_rank_where_it_is_not_set() -> None:
    env = {name: value for name, value in LAUNCHED.items() if name != "NODE_RANK"}
    assert LOCAL.world(env).node_rank == 1


@pytest.mark.parametrize(
    "missing",
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"],
)
def test_an_incomplete_set_is_refused_with_the_missing_name_and_the_facts(missing: str) -> None:
    """E4"""
    env = {name: value for name, value in LAUNCHED.items() if name != missing}
    with pytest.raises(ClusterError, match=f"{missing} is not set") as caught:
        LOCAL.world(env)
    assert all(f"{name}={value}" in str(caught.value) for name, value in env.items())


def test_a_local_rank_alone_is_refused() -> None:
    """E4: guessing a world of one here would train as many models as there are processes."""
    assert LOCAL.detect({"LOCAL_RANK": "1"}) == ("LOCAL_RANK=1",)
    with pytest.raises(ClusterError, match=r"WORLD_SIZE is not set \(found: LOCAL_RANK=1\)"):
        LOCAL.world({"LOCAL_RANK": "1"})


def test_a_launcher_name_without_a_place_is_refused() -> None:
    """E4"""
    with pytest.raises(ClusterError, match="DRIVETRAIN_LAUNCHED=script"):
        LOCAL.world({"DRIVETRAIN_LAUNCHED": "script"})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"RANK": "4"}, "RANK=4 is outside WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is outside LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 is more than WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "4"}, "RANK=3 is LOCAL_RANK=1"),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "NODE_RANK=1 is a second machine"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number of at least 1"),
        ({"WORLD_SIZE": "²"}, "is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is above 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, str], what: str) -> None:
    """E5"""
    with pytest.raises(ClusterError) as caught:
        LOCAL.world({**LAUNCHED, **changes})
    assert what in str(caught.value)


def test_torchrun_reads_its_own_names_for_machine_and_restarts() -> None:
    """E3, E6"""
    world = TORCHRUN.world(ELASTIC)
    assert (world.node_rank, world.restarts, world.environment) == (1, 2, "torchrun")
    assert "TORCHELASTIC_RUN_ID=none" in world.evidence
    assert "GROUP_RANK=1" in world.evidence


def test_torchrun_needs_its_run_id() -> None:
    assert TORCHRUN.detect(LAUNCHED) == ()
    with pytest.raises(ClusterError, match="TORCHELASTIC_RUN_ID is not set"):
        TORCHRUN.world(LAUNCHED)


def test_a_process_of_torchrun_is_not_local_too() -> None:
    """E6"""
    assert LOCAL.detect(ELASTIC) == ()
    assert find_environment(ELASTIC) is TORCHRUN


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (LAUNCHED, LOCAL),
        ({**LAUNCHED, "DRIVETRAIN_CLUSTER": "none"}, None),
        ({**ELASTIC, "DRIVETRAIN_CLUSTER": "local"}, LOCAL),
        ({**LAUNCHED, "DRIVETRAIN_CLUSTER": "none", "DRIVETRAIN_LAUNCHED": "script"}, LOCAL),
    ],
)
def test_the_users_switch_decides_but_not_for_ranks_of_our_own(
    env: dict[str, str], expected: ClusterEnvironment | None
) -> None:
    """E8"""
    assert find_environment(env) is expected


def test_an_unknown_name_in_the_switch_is_an_error() -> None:
    """E8"""
    with pytest.raises(NotFoundError, match="'slurmy'"):
        find_environment({"DRIVETRAIN_CLUSTER": "slurmy"})


@pytest.mark.parametrize("environment", [LOCAL, TORCHRUN])
def test_reading_changes_nothing(environment: ClusterEnvironment) -> None:
    """E1"""
    for env in ({}, LAUNCHED, ELASTIC, {"RANK": "x"}):
        before = dict(env)
        environment.detect(env)
        with suppress(DrivetrainError):
            environment.world(env)
        assert env == before
