"""Communication; rules L1 to L10 of docs/contracts/collectives.md."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from drivetrain_interfaces import (
    ClusterError,
    Collectives,
    ConfigurationError,
    ReduceOp,
    SideChannel,
    SupportsClose,
    SupportsSideChannel,
    UnsupportedError,
    World,
)

from drivetrain_toolkit.collectives import (
    AGENT_STORE,
    LocalCollectives,
    StoreSideChannel,
    TorchCollectives,
)

LOCAL = LocalCollectives()


def place(port, rank=0, size=2):
    return World(
        rank=rank, size=size, local_rank=rank, local_size=size, address="127.0.0.1", port=port
    )


@pytest.fixture
def server():
    """A store that is hosted elsewhere, as torchrun's is."""
    return torch.distributed.TCPStore(
        "127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False
    )


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_one_process_is_the_identity():
    """L1"""
    assert isinstance(LOCAL, Collectives)
    tensor = torch.arange(3.0)
    for op in ReduceOp:
        assert torch.equal(LOCAL.all_reduce(tensor, op), tensor)
    assert torch.equal(LOCAL.all_gather(tensor)[0], tensor)
    assert torch.equal(LOCAL.broadcast(tensor), tensor)
    assert LOCAL.broadcast_object({"a": 1}) == {"a": 1}
    LOCAL.barrier()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_mean_of_integers_is_refused(dtype):
    """L3: also by one process, so that a script does not fail only when it runs on two."""
    with pytest.raises(UnsupportedError, match=f"mean.*{dtype}"):
        LOCAL.all_reduce(torch.zeros(2, dtype=dtype), ReduceOp.MEAN)


def test_the_sum_of_booleans_is_refused():
    """L3"""
    with pytest.raises(UnsupportedError, match=r"ReduceOp\.MAX"):
        LOCAL.all_reduce(torch.tensor([True]))


def test_a_source_outside_the_world_is_refused():
    """L5"""
    with pytest.raises(ConfigurationError, match=r"rank 1.*world of 1"):
        LOCAL.broadcast(torch.ones(1), source=1)
    with pytest.raises(ConfigurationError, match=r"rank 1.*world of 1"):
        LOCAL.broadcast_object(None, source=1)


def test_reductions_over_two_ranks(two_ranks):
    """L2, L3"""
    for result in two_ranks("reductions"):
        assert result["sum"].tolist() == [3.0, 11.0]
        assert result["mean"].tolist() == [1.5, 5.5]
        assert result["min"].tolist() == [1.0, 5.0]
        assert result["max"].tolist() == [2.0, 6.0]
        assert result["untouched"]
        assert result["int"].tolist() == [3]
        assert result["bool"].tolist() == [True, False]
        assert torch.equal(result["transposed"], torch.arange(6.0).reshape(2, 3).t() * 3)


def test_gathering_takes_uneven_rows_and_scalars(two_ranks):
    """L4: rank 0 has no row at all; the dtype is one that the backend cannot reduce."""
    for result in two_ranks("gathering"):
        empty, rows = result["uneven"]
        assert empty.shape == (0, 3)
        assert torch.equal(rows, torch.ones(2, 3, dtype=torch.int16))
        assert [t.item() for t in result["scalar"]] == [0, 1]
        assert [t.tolist() for t in result["even"]] == [[0, 7], [1, 7]]


def test_gathering_what_does_not_fit_together_is_explained_on_every_rank(two_ranks):
    """L4"""
    for kind, text in two_ranks("gathering_misfits"):
        assert kind == "DataError"
        assert "[[2, 2, 3], [2, 2, 4]]" in text


def test_a_broadcast_gives_all_the_sources_tensor(two_ranks):
    """L2, L5"""
    for rank, (received, mine) in enumerate(two_ranks("broadcast")):
        assert received.tolist() == [1]
        assert mine.tolist() == [rank]


def test_objects_travel(two_ranks):
    """L6"""
    expected = {"path": "a", "numbers": [1, (2, 3)], "none": None}
    assert two_ranks("objects") == (expected, expected)


def test_an_object_that_does_not_pickle_is_refused_on_every_rank(two_ranks):
    """L6: so that none waits for it; the reason is where the object is."""
    (kind, text, cause), (other, _, nothing) = two_ranks("unpicklable_object")
    assert kind == other == "UnsupportedError"
    assert "it is a function" in text
    assert (cause != "NoneType", nothing) == (True, "NoneType")


def test_a_group_that_exists_is_joined_and_not_ended(two_ranks):
    """L9"""
    for total, closed in two_ranks("reused_group"):
        assert total.tolist() == [2.0]
        assert "after the collectives were closed" in closed


def test_the_side_channel_works_in_a_thread_while_ranks_wait(two_ranks):
    """L10: nothing before it is posted; any bytes; a later post replaces an earlier one."""
    assert two_ranks("barrier") == (True, True)
    (before, seen, after), (_, _, other) = two_ranks("side_channel")
    assert before is None
    assert seen == [b"rank 1: \x00\xff"]
    assert after == other == b"later"


def test_a_side_channel_is_usable_until_it_is_closed(server):
    """L10"""
    channel = StoreSideChannel(place(server.port), timedelta(seconds=10))
    assert isinstance(channel, SideChannel)
    assert channel.peek("a") is None
    channel.post("a", b"")
    assert channel.peek("a") == b""
    channel.close()
    channel.close()
    with pytest.raises(ClusterError, match="after it was closed"):
        channel.peek("a")


def test_side_channels_of_two_attempts_do_not_mix(server):
    """L10: torchrun keeps its store when it starts all ranks again."""
    place_here, patience = place(server.port), timedelta(seconds=10)
    one, two = (StoreSideChannel(place_here, patience, attempt) for attempt in (0, 1))
    one.post("failed", b"x")
    assert two.peek("failed") is None


def test_ranks_that_do_not_come_are_named(server):
    """L7"""
    with pytest.raises(ClusterError) as caught:
        TorchCollectives(place(server.port), "gloo", rendezvous_s=0.2, env={AGENT_STORE: "True"})
    text = str(caught.value)
    assert f"127.0.0.1:{server.port}" in text
    assert "world of 2" in text
    assert "did not come: [1]" in text
    assert not torch.distributed.is_initialized()


def test_a_store_that_nobody_hosts_is_explained(free_port):
    """L7"""
    with pytest.raises(ClusterError, match=rf"Rank 1 of 2.*127\.0\.0\.1:{free_port}") as caught:
        TorchCollectives(place(free_port, rank=1), "gloo", rendezvous_s=0.2, env={})
    assert "all 2 processes" in caught.value.hint
    assert caught.value.__cause__ is not None


def test_a_port_that_something_else_uses_is_explained(server):
    """L7: rank 0 hosts, unless torchrun does."""
    with pytest.raises(ClusterError, match=rf"Rank 0 of 2.*:{server.port}"):
        TorchCollectives(place(server.port), "gloo", rendezvous_s=0.2, env={})


HOSTING = """
import sys, torch
from drivetrain_interfaces import ClusterError, ReduceOp, SupportsClose, SupportsSideChannel, World
from drivetrain_toolkit.collectives import TorchCollectives
rank, port, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
world = World(rank=rank, size=2, local_rank=rank, local_size=2, address="127.0.0.1", port=port)
totals = []
for attempt in range(2):  # twice: the second must not meet the first one's leftovers
    if mode == "leaves" and attempt and rank == 1:
        sys.exit(3)
    patience = 1 if mode == "leaves" and attempt else 30
    try:
        talk = TorchCollectives(world, "gloo", timeout_s=20, rendezvous_s=patience, env={})
    except ClusterError as error:
        print(error)
        sys.exit(4)
    assert isinstance(talk, SupportsClose) and isinstance(talk, SupportsSideChannel)
    if mode == "dies" and rank == 1:
        sys.exit(3)
    try:
        totals.append(talk.all_reduce(torch.ones(1), ReduceOp.SUM).item())
    except ClusterError as error:
        print(error)
        sys.exit(4)
    talk.close()
    talk.close()
assert not torch.distributed.is_initialized()
print(totals)
"""


def run_pair(port, mode):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTING, str(rank), str(port), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [(child.returncode, text) for child, text in zip(children, texts, strict=True)]


def test_rank_0_hosts_and_a_process_may_connect_again(free_port):
    """L7, L9"""
    for code, text in run_pair(free_port, "lives"):
        assert code == 0, text
        assert "[2.0, 2.0]" in text


def test_an_operation_that_a_dead_rank_leaves_open_is_an_error(free_port):
    """L8"""
    (code, text), (other, _) = run_pair(free_port, "dies")
    assert (code, other) == (4, 3), text
    assert "all_reduce did not complete on rank 0 of 2" in text
    assert "[DT202]" in text


def test_a_rank_that_does_not_come_again_is_named(free_port):
    """L7, L9: that it came the first time says nothing of the second."""
    (code, text), (other, _) = run_pair(free_port, "leaves")
    assert (code, other) == (4, 3), text
    assert "did not come: [1]" in text


def test_the_optional_abilities_are_there():
    """L9, L10"""
    assert issubclass(TorchCollectives, SupportsClose)
    assert issubclass(TorchCollectives, SupportsSideChannel)
    assert not issubclass(LocalCollectives, SupportsSideChannel)
