"""Checkpoints on the disk. Rules K1 to K10 of docs/contracts/checkpoint.md."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces.checkpoint import CheckpointIO, SupportsListing
from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.errors import CheckpointError, StorageError
from torch import nn

from drivetrain_toolkit import durable
from drivetrain_toolkit.checkpoint import MANIFEST, STATE, TENSORS, DirectoryCheckpointIO, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = (MANIFEST, STATE, TENSORS)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def tree(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(3, 4, generator=generator), "b": torch.zeros(3)},
        "step": seed,
        "losses": [0.5, float("nan")],
    }


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def io() -> DirectoryCheckpointIO:
    return DirectoryCheckpointIO()


@pytest.fixture
def saved(io: DirectoryCheckpointIO, tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    io.save(tree(), str(path))
    return path


def test_it_satisfies_the_contracts(io: DirectoryCheckpointIO) -> None:
    assert isinstance(io, CheckpointIO)
    assert isinstance(io, SupportsListing)


def test_a_tree_comes_back(io: DirectoryCheckpointIO, saved: Path) -> None:
    """K1"""
    back = io.load(str(saved))
    assert torch.equal(back["model"]["w"], tree()["model"]["w"])
    assert list(back) == list(tree())
    assert back["step"] == 0
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    io: DirectoryCheckpointIO, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """K9"""
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = (raw if dtype == torch.bool else raw * 77).view(dtype).reshape(shape)
    io.save({"t": tensor}, str(tmp_path / "x"))
    back = io.load(str(tmp_path / "x"))["t"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert bits(back) == bits(tensor)


def test_a_tree_without_tensors_comes_back(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    io.save({}, str(tmp_path / "x"))
    assert io.load(str(tmp_path / "x")) == {}


def test_views_parameters_and_other_layouts_are_saved_as_what_they_show(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K9"""
    base = torch.arange(12.0).reshape(3, 4)
    values = {
        "row": base[1],
        "turned": base.t(),
        "expanded": torch.ones(1).expand(3),
        "parameter": nn.Parameter(torch.ones(2)),
        "graph": (torch.ones(2, requires_grad=True) * 2),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    io.save(values, str(tmp_path / "x"))
    back = io.load(str(tmp_path / "x"))
    for name, value in values.items():
        assert torch.equal(back[name], value), name
        assert not back[name].requires_grad
    assert (tmp_path / "x" / TENSORS).stat().st_size < 2000


def test_tied_tensors_are_saved_once_and_come_back_tied(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K9"""
    weight = torch.randn(50, 50)
    views = {"head": weight.view(-1)[:10], "tail": weight.view(-1)[10:20]}
    io.save(
        {"in": weight, "out": weight, "again": weight.view(50, 50), **views}, str(tmp_path / "x")
    )
    back = io.load(str(tmp_path / "x"))
    assert back["in"] is back["out"]
    assert back["in"] is back["again"]
    assert torch.equal(back["head"], views["head"])
    assert torch.equal(back["tail"], views["tail"])
    assert set(io.manifest(str(tmp_path / "x")).tensors) == {"in", "head", "tail"}


def test_places_that_read_alike_stay_apart(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    values = {"a": {1: torch.tensor(1), "1": torch.tensor(2)}, "__metadata__": torch.tensor(3)}
    io.save(values, str(tmp_path / "x"))
    assert io.load(str(tmp_path / "x")) == values


def test_what_is_loaded_owns_its_memory(io: DirectoryCheckpointIO, saved: Path) -> None:
    first = io.load(str(saved))
    first["model"]["w"].zero_()
    with (saved / TENSORS).open("r+b") as file:
        file.write(b"\0" * 1000)
    assert torch.equal(first["model"]["b"], torch.zeros(3))
    io.save(tree(), str(saved))
    assert torch.equal(io.load(str(saved))["model"]["w"], tree()["model"]["w"])


def test_other_readers_of_the_format_can_read_the_tensors(saved: Path) -> None:
    """K1"""
    from safetensors.torch import load_file

    assert torch.equal(load_file(saved / TENSORS)["model/w"], tree()["model"]["w"])


def test_the_manifest_says_what_wrote_it(tmp_path: Path) -> None:
    """K2"""
    io = DirectoryCheckpointIO(producer="someone 1.0", world_size=2)
    io.save(tree(), str(tmp_path / "x"))
    body = json.loads((tmp_path / "x" / MANIFEST).read_text())
    assert (body["format"], body["version"]) == ("drivetrain.checkpoint", 1)
    assert body["contract"] == str(CONTRACT)
    assert (body["producer"], body["world_size"]) == ("someone 1.0", 2)
    shard = {"file": TENSORS, "key": "model/w", "start": [0, 0], "shape": [3, 4]}
    assert body["tensors"]["model/w"] == {"dtype": "float32", "shape": [3, 4], "shards": [shard]}
    assert body["files"][STATE]["size"] == (tmp_path / "x" / STATE).stat().st_size
    age = datetime.now().astimezone() - datetime.fromisoformat(body["created"])
    assert abs(age) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.eye(3).to_sparse(), "layout"),
        (lambda: torch.empty(2, device="meta"), "meta tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (nn.UninitializedParameter, "UninitializedParameter"),
    ],
    ids=["sparse", "meta", "quantized", "subclass"],
)
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_a_tensor_without_plain_bytes_is_refused_before_anything_is_written(
    io: DirectoryCheckpointIO, tmp_path: Path, make: Callable[[], torch.Tensor], what: str
) -> None:
    """K10"""
    with pytest.raises(CheckpointError, match=f"'opt/t'.*{what}"):
        io.save({"opt": {"t": make()}}, str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_value_without_codec_is_refused_before_anything_is_written(
    io: DirectoryCheckpointIO, saved: Path
) -> None:
    """K10"""
    before = contents(saved)
    with pytest.raises(CheckpointError, match=r"'callbacks/best'.*register"):
        io.save({"callbacks": {"best": object()}}, str(saved))
    assert contents(saved) == before


def test_replacing_leaves_the_new_one_and_nothing_else(
    io: DirectoryCheckpointIO, saved: Path
) -> None:
    """K3"""
    io.save(tree(7), str(saved))
    assert io.load(str(saved))["step"] == 7
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]


def test_replacing_is_safe_where_names_cannot_be_exchanged(
    io: DirectoryCheckpointIO, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K3: at the moment without the name, readers find the old one beside it."""
    monkeypatch.setattr(durable, "exchange", lambda first, second: False)
    seen: list[int] = []
    rename = os.rename

    def look(source: str, target: str) -> None:
        rename(source, target)
        assert io.exists(str(saved))
        assert io.list(str(saved.parent)) == [str(saved)]
        seen.append(io.load(str(saved))["step"])

    monkeypatch.setattr(os, "rename", look)
    io.save(tree(7), str(saved))
    assert seen == [0, 7]
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]


def test_a_checkpoint_put_aside_by_a_killed_process_is_found_replaced_and_removed(
    io: DirectoryCheckpointIO, saved: Path
) -> None:
    """K3"""
    aside = Path(durable.replaced_name(str(saved)))
    saved.rename(aside)
    assert io.load(str(saved))["step"] == 0
    io.save(tree(1), str(saved))
    assert io.load(str(saved))["step"] == 1
    assert not aside.exists()
    saved.rename(aside)
    io.remove(str(saved))
    assert list(saved.parent.iterdir()) == []


def test_the_system_here_can_exchange_names(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has it")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert durable.exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a" / "b").exists()
    with pytest.raises(FileNotFoundError):
        durable.exchange(str(tmp_path / "a"), str(tmp_path / "c"))


def test_anything_else_than_a_checkpoint_is_not_replaced_or_removed(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K4"""
    folder, file = tmp_path / "thesis", tmp_path / "model.ckpt"
    folder.mkdir()
    (folder / "chapter").touch()
    file.touch()
    for path in (folder, file):
        with pytest.raises(CheckpointError, match="is not one"):
            io.save(tree(), str(path))
        with pytest.raises(CheckpointError, match="is not one"):
            io.remove(str(path))
    assert (folder / "chapter").exists()
    assert file.exists()


def test_an_empty_directory_may_be_replaced(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    io.save(tree(), str(tmp_path / "x"))
    assert io.exists(str(tmp_path / "x"))


def test_missing_directories_are_made(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    io.save(tree(), str(tmp_path / "a/b/c.ckpt/"))
    assert io.exists(str(tmp_path / "a/b/c.ckpt"))


def test_1000_random_bit_flips_are_all_found(io: DirectoryCheckpointIO, saved: Path) -> None:
    """K5"""
    rng = random.Random(0)
    good = contents(saved)
    for _ in range(1000):
        name = rng.choice(FILES)
        data = bytearray(good[name])
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        (saved / name).write_bytes(data)
        with pytest.raises(CheckpointError):
            io.load(str(saved))
        (saved / name).write_bytes(good[name])
    assert io.load(str(saved))["step"] == 0


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_short_or_long_or_empty_file_is_named(
    io: DirectoryCheckpointIO, saved: Path, name: str
) -> None:
    """K5"""
    data = (saved / name).read_bytes()
    for damaged in (data[:-1], data + b" ", b"", None):
        if damaged is None:
            (saved / name).unlink()
        else:
            (saved / name).write_bytes(damaged)
        assert not io.exists(str(saved))
        with pytest.raises(CheckpointError, match=name):
            io.load(str(saved))


def test_an_extra_file_is_refused(io: DirectoryCheckpointIO, saved: Path) -> None:
    """K5"""
    (saved / "extra.pkl").touch()
    with pytest.raises(CheckpointError, match=r"'extra\.pkl': the manifest does not name it"):
        io.load(str(saved))


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_file_that_leads_elsewhere_is_refused(
    io: DirectoryCheckpointIO, saved: Path, tmp_path: Path, kind: str
) -> None:
    """K6"""
    moved = tmp_path / "elsewhere"
    (saved / TENSORS).rename(moved)
    if kind == "link":
        (saved / TENSORS).symlink_to(moved)
    elif kind == "folder":
        (saved / TENSORS).mkdir()
    else:
        os.mkfifo(saved / TENSORS)
    with pytest.raises(CheckpointError, match="not a plain file"):
        io.load(str(saved))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".x", "\u017ftate.json", "a\x00"]
)
def test_a_manifest_that_names_other_files_is_refused(
    io: DirectoryCheckpointIO, saved: Path, name: str
) -> None:
    """K6: also when it is consistent in itself."""
    old = io.manifest(str(saved))
    files = {**old.files, name: old.files[STATE]}
    new = replace(old, files=files)
    (saved / MANIFEST).write_bytes(new.text())
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        io.load(str(saved))


def test_tensors_other_than_the_manifest_says_are_refused(
    io: DirectoryCheckpointIO, saved: Path
) -> None:
    """K5: also when every hash is right."""
    old = io.manifest(str(saved))
    weight, bias = old.tensors["model/w"], old.tensors["model/b"]
    renamed = replace(bias.shards[0], key="other")
    cases = (
        {"model/b": bias},
        {"model/b": bias, "model/w": replace(weight, dtype="int32")},
        {"model/b": bias, "model/w": replace(weight, dtype="float64")},
        {"model/b": bias, "model/w": replace(bias, shards=(renamed,))},
        {**old.tensors, "other": replace(bias, shards=(renamed,))},
    )
    for tensors in cases:
        new = replace(old, tensors=tensors)
        (saved / MANIFEST).write_bytes(new.text())
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
            io.load(str(saved))
    for tensors in ({**old.tensors, "other": bias}, {"model/w": replace(weight, shards=())}):
        (saved / MANIFEST).write_bytes(replace(old, tensors=tensors).text())
        with pytest.raises(CheckpointError, match=r"manifest\.json.*(same place|make up)"):
            io.load(str(saved))


def test_a_later_format_version_is_refused(io: DirectoryCheckpointIO, saved: Path) -> None:
    """K7"""
    body = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**body, "version": 2, "new": 1}))
    with pytest.raises(CheckpointError, match="version 2, and version 1"):
        io.load(str(saved))


def test_a_file_of_torch_save_is_recognised(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K7"""
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.ckpt"
        torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"torch\.save"):
            io.load(str(path))
        assert not io.exists(str(path))


@pytest.mark.parametrize("name", ["missing", "file", "folder"])
def test_what_is_no_checkpoint_is_refused_with_its_path(
    io: DirectoryCheckpointIO, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=str(tmp_path / name)):
        io.load(str(tmp_path / name))
    assert not io.exists(str(tmp_path / name))


def test_a_top_level_link_may_name_a_checkpoint(
    io: DirectoryCheckpointIO, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt").symlink_to(saved.name)
    assert io.load(str(tmp_path / "last.ckpt"))["step"] == 0


def test_code_in_the_files_is_not_run(
    io: DirectoryCheckpointIO, saved: Path, tmp_path: Path
) -> None:
    """K8: files that are consistent in themselves, and hostile."""
    marker = tmp_path / "ran"
    state = json.dumps({"$": "os.system", "value": f"touch {marker}"}).encode()
    (saved / STATE).write_bytes(state)
    old = Manifest.parse((saved / MANIFEST).read_bytes(), str(saved))
    files = {**old.files, STATE: (len(state), durable.hash_file(str(saved / STATE)))}
    new = replace(old, files=files)
    (saved / MANIFEST).write_bytes(new.text())
    with pytest.raises(CheckpointError, match=r"os\.system"):
        io.load(str(saved))
    assert not marker.exists()


def test_checkpoints_are_listed_newest_first(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K2"""
    for name in ("b", "c", "a"):
        io.save(tree(), str(tmp_path / name))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    io.save(tree(), str(tmp_path / "broken"))
    (tmp_path / "broken" / STATE).unlink()
    shutil.copytree(tmp_path / "a", tmp_path / ".hidden")
    assert io.list(str(tmp_path)) == [str(tmp_path / name) for name in ("a", "c", "b")]
    assert io.list(str(tmp_path / "missing")) == []


def test_removing_twice_is_fine(io: DirectoryCheckpointIO, saved: Path) -> None:
    io.remove(str(saved))
    io.remove(str(saved))
    io.remove(str(saved / "missing" / "x"))
    assert list(saved.parent.iterdir()) == []


def test_removing_hides_the_checkpoint_before_it_deletes(
    io: DirectoryCheckpointIO, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K4"""
    monkeypatch.setattr(durable, "discard", lambda path: None)  # as if killed right there
    io.remove(str(saved))
    assert not io.exists(str(saved))
    assert io.list(str(saved.parent)) == []
    monkeypatch.undo()
    io.save(tree(), str(saved))
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]


def test_a_file_in_place_of_the_directory_is_a_storage_error(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K4"""
    (tmp_path / "runs").touch()
    with pytest.raises(StorageError, match="runs") as caught:
        io.save(tree(), str(tmp_path / "runs" / "a.ckpt"))
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StorageError):
        io.list(str(tmp_path / "runs"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", [0, 1, 2, 3, 4])
def test_an_error_of_the_system_leaves_the_old_checkpoint_and_no_draft(
    io: DirectoryCheckpointIO,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    call: int,
) -> None:
    """K4: at each of the five times that data is forced to the disk before publishing."""
    fsync = os.fsync
    calls: list[int] = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call + 1:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=os.strerror(number)):
        io.save(tree(7), str(saved))
    assert io.load(str(saved))["step"] == 0
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]


CHILD = """
import resource, sys
import torch
from drivetrain_interfaces.errors import StorageError
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
"""


def run(code: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD + code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_a_file_that_may_not_grow_is_a_storage_error(
    io: DirectoryCheckpointIO, saved: Path
) -> None:
    """K4: a real refusal by the kernel, in the middle of the tensors."""
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    DirectoryCheckpointIO().save({"t": torch.ones(100_000), "step": 9}, sys.argv[1])
except StorageError as error:
    print(error)
"""
    done = run(code, str(saved))
    assert "File too large" in done.stdout, done.stderr
    assert "[DT402]" in done.stdout
    assert io.load(str(saved))["step"] == 0
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]


def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K3: at a random moment, while a checkpoint is being replaced."""
    path = tmp_path / "a.ckpt"
    code = """
io, step = DirectoryCheckpointIO(), int(sys.argv[2])
while True:
    step += 1
    io.save({"t": torch.full((200_000,), float(step)), "step": step}, sys.argv[1])
    print(step, flush=True)
"""
    rng = random.Random(0)
    io.save({"t": torch.zeros(200_000), "step": 0}, str(path))
    step = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD + code, str(path), str(step)],
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            for _ in range(rng.randrange(1, 6)):
                confirmed = int(child.stdout.readline())
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=rng.random() * 0.01)
            child.send_signal(signal.SIGKILL)
            confirmed = max([confirmed, *map(int, child.stdout.read().split())])
        back = io.load(str(path))
        step = back["step"]
        assert step in (confirmed, confirmed + 1)
        assert torch.equal(back["t"], torch.full((200_000,), float(step)))
        assert io.list(str(tmp_path)) == [str(path)]
    io.save(tree(), str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_drafts_of_dead_processes_are_swept_and_those_of_live_ones_stay(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait(timeout=60)
    here = durable.hidden_sibling(str(tmp_path / "b.ckpt"))
    dead = here.replace(f".{os.getpid()}.", f".{gone.pid}.")
    far = here.replace(".draft-", ".draft-other-")
    for folder in (here, dead, far):
        os.mkdir(folder)
    io.save(tree(), str(tmp_path / "a.ckpt"))
    assert (os.path.exists(here), os.path.exists(dead), os.path.exists(far)) == (True, False, True)


def test_an_interrupted_save_cleans_up(
    io: DirectoryCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(draft: str, path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        io.save(tree(), str(tmp_path / "a.ckpt"))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_swapped_by_a_link_while_it_is_read_stays_the_same(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K6: what was opened is read to its end, wherever the name leads by then."""
    io.save({"w": torch.ones(3)}, str(tmp_path / "a"))
    io.save({"w": torch.zeros(3)}, str(tmp_path / "b"))
    opened = io.open(str(tmp_path / "a"))
    os.rename(tmp_path / "a", tmp_path / "moved")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert torch.equal(opened["w"].read(), torch.ones(3))
    assert torch.equal(io.load(str(tmp_path / "a"))["w"], torch.zeros(3))
    (tmp_path / "b" / TENSORS).unlink()
    (tmp_path / "b" / TENSORS).symlink_to(tmp_path / "moved" / TENSORS)
    with pytest.raises(CheckpointError, match="not a plain file"):
        io.load(str(tmp_path / "a"))
