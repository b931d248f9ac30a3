"""Lists of hosts and numbers of tasks as SLURM writes them, and ports made from numbers."""

from __future__ import annotations

import pytest

from drivetrain_toolkit.environments.hosts import (
    expand_counts,
    expand_hosts,
    first_host,
    port_of,
    same_host,
)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node[01-03,07],gpu-a1", "node01 node02 node03 node07 gpu-a1"),
        ("node[1-2]", "node1 node2"),
        ("r[1-2]n[01-02]", "r1n01 r1n02 r2n01 r2n02"),
        ("gpu-a[001-003],cpu7,x[9-11]", "gpu-a001 gpu-a002 gpu-a003 cpu7 x9 x10 x11"),
        ("a[1-2]-ib.example.org", "a1-ib.example.org a2-ib.example.org"),
        ("a, b", "a b"),
        ("", ""),
    ],
)
def test_a_list_of_hosts_is_expanded_in_order(text: str, hosts: str) -> None:
    assert expand_hosts(text) == tuple(hosts.split())


@pytest.mark.parametrize(
    "text", ["node[1-2", "node1-2]", "node[2-1]", "node[a-b]", "n[[1]]", "n[]"]
)
def test_a_broken_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"brackets|range|whole number"):
        expand_hosts(text)


def test_a_list_without_hosts_has_no_first() -> None:
    assert first_host("n[5,2]") == "n5"
    with pytest.raises(ValueError, match="names no host"):
        first_host("")


def test_numbers_of_tasks_are_expanded() -> None:
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)
    assert expand_counts("4") == (4,)
    for broken in ("2(x3", "two", "2x3", ""):
        with pytest.raises(ValueError, match=r"whole number|no number of tasks"):
            expand_counts(broken)


def test_jobs_with_close_numbers_and_steps_of_one_job_never_share_a_port() -> None:
    """E13"""
    for start in (1, 19_700, 4_000_000):
        ports = [port_of(job, step) for job in range(start, start + 900) for step in range(16)]
        assert len(set(ports)) == len(ports)
        assert min(ports) >= 10_000
        assert max(ports) < 32_768, "Linux takes ports for outgoing connections from there"


def test_a_later_start_of_a_job_meets_at_another_port() -> None:
    assert len({port_of(7, 0, restart) for restart in range(10)}) == 10


def test_short_and_full_names_of_a_host_are_the_same() -> None:
    assert same_host("g33n06", "g33n06.cluster.example")
    assert not same_host("g33n06.one", "g33n06.other")
    assert not same_host("g33n06", "g33n07")
