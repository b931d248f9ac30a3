"""Collectives in worlds of 1, 2 and 4, compared with plain Python."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_conformance.outcomes import BY_DECLARATION, NOT_HERE
from drivetrain_conformance.support.collective_cases import values
from drivetrain_conformance.support.crew import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain_conformance.fixtures import Crews
    from drivetrain_conformance.support.crew import Crew, LonelyCrew

    AnyCrew = Crew | LonelyCrew

CASES = "drivetrain_conformance.support.collective_cases"
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
#: A rank that died is noticed by the others in this time.
DEATH_S = 60.0


def reduced(op: str, size: int, dtype: str) -> list[float]:
    """The reduction over ranks, in plain Python."""
    columns = list(zip(*(values(rank, dtype) for rank in range(size)), strict=True))
    by_op = {"sum": math.fsum, "min": min, "max": max, "mean": lambda c: math.fsum(c) / len(c)}
    return [float(by_op[op](column)) for column in columns]  # type: ignore[operator]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_is_the_reduction_over_ranks(crew: AnyCrew, dtype: str) -> None:
    """Every operation that the dtype allows; the others are refused.

    R: L2, L3
    """
    rule = f"L3: all_reduce of {dtype} is the reduction over ranks"
    answers = crew.run(f"{CASES}:reduce_all", rule, dtype=dtype)
    if answers[0] is None:
        pytest.skip(f"{NOT_HERE}the device holds no {dtype}")
    for rank, answer in enumerate(answers):
        assert answer["untouched"], f"L2: the tensor that is given is left as it was, rank {rank}"
        assert answer["same kind"], f"L3: all_reduce keeps shape and dtype, rank {rank}"
        assert answer["same device"], f"L3: the reduction is where the tensor was, rank {rank}"
        for op in ("sum", "mean", "min", "max"):
            found = answer[op]
            if isinstance(found, tuple):
                assert found[0] == "UnsupportedError", (
                    f"L3: the {op} of {dtype} is refused with an UnsupportedError; {found}"
                )
                continue
            wanted = reduced(op, crew.size, dtype)
            assert found == pytest.approx(wanted, rel=1e-2 if "16" in dtype else 1e-6), (
                f"L3: the {op} of {dtype} over {crew.size} ranks is {wanted}; rank {rank} got "
                f"{found}"
            )


def test_all_reduce_keeps_every_shape(crew: AnyCrew) -> None:
    """A scalar, an empty tensor, one that is not contiguous, and a larger one.

    R: L3
    """
    rule = "L3: all_reduce keeps shapes"
    size = crew.size
    ranks = size * (size - 1) / 2
    for answer in crew.run(f"{CASES}:reduce_shapes", rule):
        wanted = {
            "scalar": [size + ranks],
            "empty": [],
            "transposed": [size * v + ranks for v in (0, 3, 1, 4, 2, 5)],
            "large": [size * (n % 7) + ranks for n in range(50_000)],
        }
        for name, (same, found) in answer.items():
            assert same, f"L3: all_reduce keeps the shape of a tensor that is {name}"
            assert found == wanted[name], f"L3: all_reduce of a tensor that is {name} is wrong"


def test_all_reduce_leaves_the_graph(crew: AnyCrew) -> None:
    """Whoever backpropagates later finds it as it was.

    R: L2
    """
    for _, gradient in crew.run(f"{CASES}:reduce_with_gradient", "L2: the graph is left"):
        assert gradient == 4.0, f"L2: the tensor that is given is left as it was; {gradient}"  # noqa: PLR2004


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["even", "uneven", "empty"])
def test_all_gather_gives_the_tensor_of_every_rank(crew: AnyCrew, dtype: str, rows: str) -> None:
    """In rank order; the first dimension may differ, and may be zero.

    R: L2, L4
    """
    counts = {
        "even": [2] * crew.size,
        "uneven": [1 + 2 * rank for rank in range(crew.size)],
        "empty": [0 if rank == 0 else rank for rank in range(crew.size)],
    }[rows]
    rule = f"L4: all_gather of {dtype} with {counts} rows"
    answers = crew.run(f"{CASES}:gather", rule, dtype=dtype, rows=counts)
    if answers[0] is None:
        pytest.skip(f"{NOT_HERE}the device holds no {dtype}")
    one = (lambda _: 1.0) if dtype == "bool" else float
    wanted = [[one(rank + 1)] * (3 * count) for rank, count in enumerate(counts)]
    for answer in answers:
        assert answer["shapes"] == [[count, 3] for count in counts], (
            f"{rule} gives one tensor per rank with its own shape; it gave {answer['shapes']}"
        )
        assert answer["values"] == wanted, f"{rule} gives the tensors in rank order"
        assert answer["kinds"], f"{rule} keeps the dtype"
        assert answer["same device"], f"{rule} gives tensors where the given one was"
        assert answer["untouched"], "L2: the tensor that is given is left as it was"


def test_all_gather_takes_scalars(crew: AnyCrew) -> None:
    """A metric is one number.

    R: L4
    """
    for found in crew.run(f"{CASES}:gather_scalars", "L4: all_gather takes scalars"):
        assert found == [float(rank) for rank in range(crew.size)], (
            f"L4: all_gather gives one scalar per rank, in rank order; it gave {found}"
        )


def test_tensors_may_lie_in_memory_as_they_like(crew: AnyCrew) -> None:
    """Transposed, a column of a matrix, or part of a graph.

    R: L4, L5
    """
    rule = "L4, L5: tensors may lie in memory as they like"
    mine = [[[10.0 * r + 3 * i + j for j in range(3)] for i in range(2)] for r in range(crew.size)]
    shapes: dict[str, list[Any]] = {
        "transposed": [[list(row) for row in zip(*m, strict=True)] for m in mine],
        "column": [[row[1] for row in m] for m in mine],
        "graph": mine,
    }
    for answer in crew.run(f"{CASES}:odd_tensors", rule):
        for name, by_rank in shapes.items():
            assert answer[f"gathered {name}"] == by_rank, f"{rule}; all_gather of {name} is wrong"
            assert answer[f"broadcast {name}"] == by_rank[-1], f"{rule}; broadcast of {name}"


def test_all_gather_of_misfits_is_refused_everywhere(several: AnyCrew) -> None:
    """With all shapes, so that the one that is wrong can be seen.

    R: L4
    """
    rule = "L4: all_gather of rows of different widths is a DataError on every rank"
    for kind, text in several.run(f"{CASES}:gather_misfits", rule):
        assert kind == "DataError", f"{rule}; it was {kind}: {text}"
        for width in range(3, 3 + several.size):
            assert str(width) in text, f"L4: the text has all shapes, also {width}: {text}"
    check_in_step(several)


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_gives_the_tensor_of_the_source(crew: AnyCrew, dtype: str) -> None:
    """Whichever rank that is.

    R: L2, L5
    """
    for source in range(crew.size):
        rule = f"L5: broadcast of {dtype} gives the tensor of rank {source}"
        wanted = [1.0 if dtype == "bool" else source + 1.0] * 4
        for answer in crew.run(f"{CASES}:broadcast", rule, source=source, dtype=dtype):
            if answer is None:
                pytest.skip(f"{NOT_HERE}the device holds no {dtype}")
            assert answer["values"] == wanted, f"{rule}; it gave {answer['values']}"
            assert answer["same kind"], f"{rule} and keeps shape and dtype"
            assert answer["untouched"], "L2: the tensor that is given is left as it was"


def test_broadcast_object_gives_the_value_of_the_source(crew: AnyCrew) -> None:
    """Numbers, texts, lists and dictionaries of them.

    R: L6
    """
    for source in range(crew.size):
        rule = f"L6: broadcast_object gives the value of rank {source}"
        for found in crew.run(f"{CASES}:broadcast_objects", rule, source=source):
            assert found["from"] == source, f"{rule}; it gave that of rank {found['from']}"
            assert found["nested"] == {"a": (1.5, True)}, f"{rule}, with everything in it: {found}"


def test_an_object_that_does_not_pickle_is_refused_everywhere(several: AnyCrew) -> None:
    """So that no rank waits for it.

    R: L6
    """
    rule = "L6: an object that does not pickle is an UnsupportedError on every rank"
    for (kind, text), after in several.run(f"{CASES}:broadcast_what_does_not_pickle", rule):
        assert kind == "UnsupportedError", f"{rule}; it was {kind}: {text}"
        assert after == 0, "L1: ranks still understand each other afterwards"


def test_a_source_outside_the_world_is_refused(crew: AnyCrew) -> None:
    """Before anything is sent.

    R: L5
    """
    rule = "L5: a source outside the world is a ConfigurationError"
    for answers in crew.run(f"{CASES}:bad_sources", rule):
        for kind, text in answers:
            assert kind == "ConfigurationError", f"{rule}; it was {kind}: {text}"
    check_in_step(crew)


def test_a_barrier_waits_for_everybody(crew: AnyCrew, tmp_path: Path) -> None:
    """What each did before it is seen by all after it.

    R: L1
    """
    for found in crew.run(f"{CASES}:meet", "L1: a barrier", folder=tmp_path):
        assert len(found) == crew.size, (
            f"L1: barrier returns once every rank has called it; one saw only {found}"
        )


def test_closing_may_be_repeated_and_connecting_too(several: AnyCrew) -> None:
    """And what is closed says so.

    R: L8, L9
    """
    rule = "L9: close may be repeated, and a process may connect again afterwards"
    for answer in several.run(f"{CASES}:close_and_connect_again", rule):
        if not answer["closes"]:
            pytest.skip(f"{BY_DECLARATION}the collectives hold nothing open")
        for name, (kind, text) in answer["after"].items():
            assert kind == "ClusterError", (
                f"L8: {name} after close is a ClusterError; it was {kind}: {text}"
            )
        assert answer["again"] == several.size, f"{rule}; the sum of ones was {answer['again']}"


def test_a_group_that_the_user_made_is_joined_and_not_ended(pair: AnyCrew) -> None:
    """Scripts that call torch.distributed themselves keep it.

    R: L9
    """
    rule = "L9: a process group that somebody else made is joined and not ended"
    for answer in pair.run(f"{CASES}:join_a_group", rule, port=free_port()):
        if answer["still there"]:
            pytest.skip(f"{BY_DECLARATION}the collectives keep their group after close")
        assert answer["total"] == pair.size, f"{rule}; the sum of ones was {answer['total']}"
        assert answer["kept"], f"{rule}; it was ended"
    check_in_step(pair)


def test_a_side_channel_keeps_what_was_posted_last(several: AnyCrew) -> None:
    """And has nothing where nobody posted.

    R: L10
    """
    rule = "L10: a side channel"
    for answer in several.run(f"{CASES}:side_channel", rule):
        if answer is None:
            pytest.skip(f"{BY_DECLARATION}the collectives have no side channel")
        assert answer["absent"] is None, "L10: peek returns None for what was not posted"
        assert answer["other"] == bytes(range(256)), (
            f"L10: post replaces what was there, and any rank sees it; {answer['other']!r}"
        )


def test_a_side_channel_works_beside_a_collective(several: AnyCrew) -> None:
    """A rank that waits at a barrier answers from a thread.

    R: L10
    """
    rule = "L10: a side channel is safe in a thread while ranks wait in a collective"
    answers = several.run(f"{CASES}:side_channel_beside_a_collective", rule)
    if answers[0] is None:
        pytest.skip(f"{BY_DECLARATION}the collectives have no side channel")
    assert all(answers), f"{rule}; these ranks were not heard or did not hear: {answers}"


@pytest.fixture(scope="module")
def fragile(crews: Crews) -> dict[str, Any]:
    """Processes to be broken: first a port that is taken, then a rank that dies."""
    crew = crews.new(2)
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            rule = "L7: a rendezvous that fails is a ClusterError"
            occupied = crew.run(f"{CASES}:occupied_port", rule, port=port)
        rule = "L8: an operation that cannot complete because a rank died is a ClusterError"
        death = crew.run(f"{CASES}:last_rank_dies", rule, dying=[1], seconds=DEATH_S)
    finally:
        crew.stop()
    return {"port": port, "occupied": occupied[0], "death": death[0]}


def test_a_rendezvous_that_fails_says_where(fragile: dict[str, Any]) -> None:
    """Here because somebody else listens at the port.

    R: L7
    """
    kind, text = fragile["occupied"]
    assert kind == "ClusterError", f"L7: a rendezvous that fails is a ClusterError; {kind}: {text}"
    assert str(fragile["port"]) in text, f"L7: its text has address, port and world: {text}"


def test_a_rank_that_dies_ends_the_collectives_of_the_others(fragile: dict[str, Any]) -> None:
    """In bounded time, and with an error that says so.

    R: L8
    """
    kind, text = fragile["death"]["answer"]
    assert kind == "ClusterError", (
        f"L8: an operation that cannot complete because a rank died is a ClusterError; it was "
        f"{kind}: {text}"
    )
    assert fragile["death"]["seconds"] < DEATH_S, (
        f"L8: it ends in bounded time; it took {fragile['death']['seconds']:.0f} s"
    )


def check_in_step(crew: AnyCrew) -> None:
    """No collective of what went before was left unmatched."""
    rule = "L1: every rank calls the same operations in the same order"
    wanted = crew.size * (crew.size + 1) / 2
    for found in crew.run(f"{CASES}:still_in_step", rule):
        assert found == wanted, f"{rule}; the sum of ranks is {wanted} and came out as {found}"
