"""Checkpoints that several processes write. Rules K16 to K18 of docs/contracts/checkpoint.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces.checkpoint import (
    SaveGroup,
    Shard,
    StoredTensor,
    SupportsShardedLoad,
    SupportsShardedSave,
)
from drivetrain_interfaces.errors import CheckpointError, ProcessFailedError, StorageError

from drivetrain_toolkit import durable
from drivetrain_toolkit.checkpoint import MANIFEST, STATE, DirectoryCheckpointIO
from drivetrain_toolkit.manifest import tiling_problem
from drivetrain_toolkit.together import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WHOLE = torch.arange(7.0 * 3).reshape(7, 3)


def row_shards(whole: torch.Tensor, size: int) -> list[Shard]:
    """As FSDP divides a parameter: rows, the first processes one more; the last may have none."""
    parts = torch.tensor_split(whole, size)
    starts = [sum(len(part) for part in parts[:rank]) for rank in range(size)]
    rest = (0,) * (whole.dim() - 1)
    return [
        Shard(part, (start, *rest), tuple(whole.shape))
        for part, start in zip(parts, starts, strict=True)
    ]


def together(
    trees: Sequence[Any], path: Path, *, token: str = "abc", timeout: float = 30
) -> list[Exception | None]:
    """Save in as many threads as there are trees, each with an IO of its own."""

    def one(rank: int) -> Exception | None:
        try:
            DirectoryCheckpointIO().save_sharded(
                trees[rank], str(path), SaveGroup(rank, len(trees), token, timeout)
            )
        except Exception as error:  # noqa: BLE001 - what the test looks at
            return error
        return None

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(one, range(len(trees))))


def fsdp_like(size: int) -> list[dict[str, Any]]:
    shards = row_shards(WHOLE, size)
    return [{"module": {"w": shard, "b": torch.ones(3)}, "step": 5} for shard in shards]


def zero_like(size: int) -> list[dict[str, Any]]:
    """Whole parameters everywhere; the optimizer's state of each on one process."""
    names = ["a", "b", "c", "d", "e"]
    module = {name: torch.full((4,), float(n)) for n, name in enumerate(names)}
    return [
        {
            "module": module,
            "optimizers": [
                {
                    "state": {
                        name: {"step": 3, "exp_avg": module[name] * 2}
                        for n, name in enumerate(names)
                        if n % size == rank
                    },
                    "groups": [{"parameters": names, "lr": 0.1}],
                }
            ],
        }
        for rank in range(size)
    ]


def test_it_satisfies_the_contracts() -> None:
    io = DirectoryCheckpointIO()
    assert isinstance(io, SupportsShardedSave)
    assert isinstance(io, SupportsShardedLoad)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shards_become_one_tensor_at_any_world_size(tmp_path: Path, size: int) -> None:
    """K16: also with more processes than rows."""
    assert together(fsdp_like(size), tmp_path / "x") == [None] * size
    back = DirectoryCheckpointIO().load(str(tmp_path / "x"))
    assert torch.equal(back["module"]["w"], WHOLE)
    assert torch.equal(back["module"]["b"], torch.ones(3))
    assert back["step"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert DirectoryCheckpointIO().verify(str(tmp_path / "x")) == []


@pytest.mark.parametrize("size", [2, 4])
def test_parts_that_only_one_process_has_are_all_there(tmp_path: Path, size: int) -> None:
    """K16"""
    assert together(zero_like(size), tmp_path / "x") == [None] * size
    back = DirectoryCheckpointIO().load(str(tmp_path / "x"))
    (alone,) = zero_like(1)
    state = back["optimizers"][0]["state"]
    assert state.keys() == alone["optimizers"][0]["state"].keys()
    assert torch.equal(state["c"]["exp_avg"], torch.full((4,), 4.0))
    assert back["optimizers"][0]["groups"] == alone["optimizers"][0]["groups"]


def test_what_all_have_is_written_once_and_by_all(tmp_path: Path) -> None:
    """K17: two replicas of a state take half the time, not twice the room."""
    tree = {str(n): torch.randn(1000) for n in range(10)}
    assert together([tree, tree], tmp_path / "x") == [None, None]
    sizes = sorted(
        path.stat().st_size for path in (tmp_path / "x").iterdir() if path.suffix != ".json"
    )
    assert len(sizes) == 2
    assert sum(sizes) < 1.1 * 10 * 4000
    assert sizes[1] < 1.1 * sizes[0]
    back = DirectoryCheckpointIO().load(str(tmp_path / "x"))
    assert all(torch.equal(back[name], tree[name]) for name in tree)


def test_a_grid_of_shards_with_replicas_comes_back(tmp_path: Path) -> None:
    """K16: columns as well as rows, each box on two processes."""
    whole = torch.randn(4, 6, 2)
    boxes = [(r, c) for r in (0, 2) for c in (0, 2)] * 2
    trees = [
        {
            "w": Shard(
                whole[r : r + 2, c : c + (2 if c == 0 else 4)].contiguous(), (r, c, 0), (4, 6, 2)
            )
        }
        for r, c in boxes
    ]
    assert together(trees, tmp_path / "x") == [None] * 8
    assert torch.equal(DirectoryCheckpointIO().load(str(tmp_path / "x"))["w"], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_any_box_can_be_read_alone(tmp_path: Path, dtype: torch.dtype, size: int) -> None:
    """K18"""
    whole = torch.arange(5 * 4 * 3).reshape(5, 4, 3).to(dtype)
    shards = row_shards(whole, size)
    assert together([{"w": shard} for shard in shards], tmp_path / "x") == [None] * size
    stored = DirectoryCheckpointIO().open(str(tmp_path / "x"))["w"]
    assert isinstance(stored, StoredTensor)
    assert (stored.shape, stored.dtype) == ((5, 4, 3), dtype)
    same = torch.uint8 if dtype.itemsize == 1 else dtype
    assert torch.equal(stored.read().view(same), whole.view(same))
    for start, shape in [
        ((0, 0, 0), (5, 4, 3)),
        ((1, 0, 0), (3, 4, 3)),
        ((0, 1, 0), (5, 2, 3)),
        ((2, 1, 1), (2, 3, 1)),
        ((4, 0, 0), (1, 4, 3)),
        ((5, 0, 0), (0, 4, 3)),
    ]:
        index = tuple(slice(s, s + e) for s, e in zip(start, shape, strict=True))
        assert torch.equal(stored.read(start, shape).view(same), whole[index].view(same))
    for start, shape in [((0, 0, 0), (6, 4, 3)), ((-1, 0, 0), (1, 1, 1)), ((0, 0), (1, 1))]:
        with pytest.raises(CheckpointError, match="A box of"):
            stored.read(start, shape)


def test_scalars_and_empty_tensors_can_be_read_lazily(tmp_path: Path) -> None:
    io = DirectoryCheckpointIO()
    io.save({"s": torch.tensor(3), "e": torch.empty(0, 2)}, str(tmp_path / "x"))
    back = io.open(str(tmp_path / "x"))
    assert back["s"].read().item() == 3
    assert back["e"].read().shape == (0, 2)


def test_a_lazy_tensor_outlives_the_directory_and_sees_damage(tmp_path: Path) -> None:
    """K18: a file is verified before the first read, and what was opened stays what it was."""
    io = DirectoryCheckpointIO()
    for name in ("x", "y"):
        io.save({"w": WHOLE}, str(tmp_path / name))
    kept, damaged = io.open(str(tmp_path / "x")), io.open(str(tmp_path / "y"))
    io.save({"w": WHOLE * 2}, str(tmp_path / "z"))
    file = tmp_path / "y" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="not what was written"):
        damaged["w"].read((0, 0), (1, 1))
    os.rename(tmp_path / "x", tmp_path / "moved")
    os.rename(tmp_path / "z", tmp_path / "x")
    assert torch.equal(kept["w"].read(), WHOLE)


def test_an_encoding_error_of_one_is_raised_in_all(tmp_path: Path) -> None:
    """K17"""
    for bad in (0, 1, 2):
        trees: list[dict[str, Any]] = [{"a": torch.ones(2), "n": 1} for _ in range(3)]
        trees[bad]["n"] = object()
        errors = together(trees, tmp_path / "x")
        assert all(isinstance(error, CheckpointError) for error in errors)
        assert "no codec" in str(errors[bad])
        assert all(f"process {bad} could" in str(e) for e in errors if e is not errors[bad])
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_one_is_raised_in_all_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K17"""
    assert together(fsdp_like(2), tmp_path / "x") == [None, None]
    write = durable.write_file

    def full(path: str, fill: Callable[..., None], size: int) -> tuple[int, str]:
        if path.endswith("tensors-00001.safetensors"):
            raise OSError(28, "No space left on device")
        return write(path, fill, size)

    monkeypatch.setattr(durable, "write_file", full)
    errors = together(fsdp_like(2), tmp_path / "x", token="def")
    assert isinstance(errors[1], StorageError)
    assert "process 1 could not write its part" in str(errors[0])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert DirectoryCheckpointIO().verify(str(tmp_path / "x")) == []


def test_shards_that_leave_a_gap_are_refused(tmp_path: Path) -> None:
    """K16"""
    trees = fsdp_like(2)
    trees[1]["module"]["w"] = Shard(torch.ones(2, 3), (4, 0), (7, 3))
    errors = together(trees, tmp_path / "x")
    assert "'module/w'" in str(errors[0])
    assert "2 shards do not make up (7, 3)" in str(errors[0])
    assert isinstance(errors[1], CheckpointError)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_disagree_about_a_tensor_are_told(tmp_path: Path) -> None:
    trees = [{"w": torch.ones(2)}, {"w": torch.ones(3)}]
    assert "float32 of shape (2,) and float32 of shape (3,)" in str(together(trees, tmp_path)[0])


def test_a_missing_process_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    """K17"""
    with pytest.raises(CheckpointError, match=r"0\.2 s for the plans of processes 1, 2"):
        DirectoryCheckpointIO().save_sharded(
            {"a": 1}, str(tmp_path / "x"), SaveGroup(0, 3, "t", timeout=0.2)
        )
    with pytest.raises(CheckpointError, match=r"waited 0\.1 s for process 0 to begin"):
        DirectoryCheckpointIO().save_sharded(
            {"a": 1}, str(tmp_path / "x"), SaveGroup(1, 3, "t", timeout=0.1)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_shard_outside_its_whole_or_alone_is_refused(tmp_path: Path) -> None:
    io = DirectoryCheckpointIO()
    with pytest.raises(CheckpointError, match="leaves the whole"):
        io.save({"w": Shard(torch.ones(3), (5,), (7,))}, str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="save_sharded"):
        io.save({"w": Shard(torch.ones(3), (0,), (7,))}, str(tmp_path / "x"))
    io.save({"w": Shard(torch.ones(7), (0,), (7,))}, str(tmp_path / "x"))
    assert torch.equal(io.load(str(tmp_path / "x"))["w"], torch.ones(7))


def test_the_first_process_counts_where_trees_disagree() -> None:
    trees = [{"a": 1, "l": [{"x": 1}], "$": {}}, {"a": 2}]
    assert merged(trees) == trees[0]
    assert merged([{"a": 1, "l": [{"x": 1}]}, {"a": 2, "b": 3, "l": [{"y": 2}]}, {"l": []}]) == {
        "a": 1, "l": [{"x": 1, "y": 2}], "b": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "boxes", "fits"),
    [
        ((), [((), ())], True),
        ((), [], False),
        ((), [((), ()), ((), ())], False),
        ((4,), [((0,), (2,)), ((2,), (2,))], True),
        ((4,), [((0,), (3,)), ((2,), (2,))], False),
        ((4,), [((0,), (2,)), ((0,), (2,))], False),
        ((4,), [((0,), (2,)), ((2,), (1,))], False),
        ((4,), [((0,), (4,)), ((4,), (0,))], True),
        ((4,), [((0,), (5,))], False),
        ((4,), [((0, 0), (4, 1))], False),
        ((2, 2), [((0, 0), (1, 2)), ((1, 0), (1, 1)), ((1, 1), (1, 1))], True),
        # A pinwheel: no cut goes through
        (
            (3, 3),
            [
                ((0, 0), (1, 2)),
                ((0, 2), (2, 1)),
                ((2, 1), (1, 2)),
                ((1, 0), (2, 1)),
                ((1, 1), (1, 1)),
            ],
            True,
        ),
        # The right volume and the wrong place
        (
            (3, 3),
            [
                ((0, 0), (1, 2)),
                ((0, 2), (2, 1)),
                ((2, 1), (1, 2)),
                ((1, 0), (2, 1)),
                ((0, 1), (1, 1)),
            ],
            False,
        ),
        ((0, 3), [((0, 0), (0, 3))], True),
        ((0, 3), [], False),
    ],
)
def test_boxes_that_make_up_a_whole_are_told_from_others(
    shape: Any, boxes: Any, fits: bool
) -> None:
    assert (not tiling_problem(shape, boxes)) is fits


def test_boxes_that_tile_are_recognised_wherever_they_are_cut() -> None:
    """Against a count of every item, with random cuts and random faults."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    for _ in range(200):
        shape = tuple(1 + draw(5) for _ in range(1 + draw(3)))
        boxes = [((0,) * len(shape), shape)]
        for _ in range(draw(6)):
            start, extent = boxes.pop(draw(len(boxes)))
            axis = draw(len(shape))
            cut = draw(extent[axis] + 1)
            for low, high in ((0, cut), (cut, extent[axis])):
                new_start, new_extent = list(start), list(extent)
                new_start[axis] += low
                new_extent[axis] = high - low
                boxes.append((tuple(new_start), tuple(new_extent)))
        if draw(2):
            at = draw(len(boxes))
            boxes[at] = (tuple(draw(size) for size in shape), boxes[at][1])
        count = torch.zeros(shape)
        inside = all(s + e <= w for box in boxes for s, e, w in zip(*box, shape, strict=True))
        for start, extent in boxes if inside else ():
            count[tuple(slice(s, s + e) for s, e in zip(start, extent, strict=True))] += 1
        assert (not tiling_problem(shape, boxes)) is (inside and bool((count == 1).all()))


PROCESS = """
import sys, torch
from drivetrain_interfaces.checkpoint import SaveGroup, Shard
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
whole = torch.arange(1000.0 * 64).reshape(1000, 64)
first, last = rank * 1000 // size, (rank + 1) * 1000 // size
tree = {"w": Shard(whole[first:last], (first, 0), (1000, 64)), "who": rank}
io = DirectoryCheckpointIO(world_size=size)
pending = io.begin_save(tree, path, group=SaveGroup(rank, size, "t0", 60))
pending.wait()
"""


@pytest.mark.parametrize("size", [2])
def test_processes_save_in_the_background_and_any_number_loads(tmp_path: Path, size: int) -> None:
    """K16, K17: real processes, no communication between them but the directory."""
    path = tmp_path / "x"
    children = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(size), str(path)])
        for rank in range(size)
    ]
    for child in children:
        with child:
            assert child.wait(timeout=100) == 0
    io = DirectoryCheckpointIO()
    back = io.load(str(path))
    assert torch.equal(back["w"], torch.arange(1000.0 * 64).reshape(1000, 64))
    assert back["who"] == 0
    facts = io.manifest(str(path))
    assert facts.world_size == size
    assert len(facts.files) == size + 1
    assert {MANIFEST, STATE} <= {each.name for each in path.iterdir()}
    for others in (1, 3):  # another world size reads its own rows
        for rank in range(others):
            first, last = rank * 1000 // others, (rank + 1) * 1000 // others
            mine = io.open(str(path))["w"].read((first, 0), (last - first, 64))
            assert torch.equal(mine, back["w"][first:last])


OTHER = """
import sys, torch
from drivetrain_interfaces.checkpoint import SaveGroup
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
DirectoryCheckpointIO().save_sharded({"a": 1}, sys.argv[1], SaveGroup(0, 2, "t"))
"""


def test_the_death_of_process_0_ends_the_save_of_the_others(tmp_path: Path) -> None:
    """K17: long before the time is up."""
    if not durable.machine():
        pytest.skip("this system does not tell processes of one machine from others")
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path / "x")]) as other:
        try:
            ends = time.monotonic() + 60
            while not list(tmp_path.glob(".*/note-plan-0")):
                assert other.poll() is None
                assert time.monotonic() < ends
                time.sleep(0.01)
        finally:
            other.kill()
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r"process 0 \(pid \d+\) has ended"):
        DirectoryCheckpointIO().save_sharded({"a": 1}, str(tmp_path / "x"), SaveGroup(1, 2, "t"))
    assert time.monotonic() - begin < 300


def test_who_knows_better_ends_a_save_that_waits(tmp_path: Path) -> None:
    """K17"""

    def check() -> None:
        raise ProcessFailedError("Rank 1 is gone.", "See there.")

    with pytest.raises(ProcessFailedError, match="Rank 1 is gone"):
        DirectoryCheckpointIO().save_sharded(
            {"a": 1}, str(tmp_path / "x"), SaveGroup(0, 2, "t", timeout=0.2, check=check)
        )
    assert list(tmp_path.iterdir()) == []
