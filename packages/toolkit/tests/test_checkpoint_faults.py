"""What the system refuses: real file systems that are full, read-only or somebody else's. Rule K4.

One child does it all in a mount namespace of its own, so that nothing stays mounted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces.errors import StorageError

from drivetrain_toolkit import durable
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

if TYPE_CHECKING:
    from pathlib import Path

CHILD = """
import json, os, subprocess, sys
import torch
from drivetrain_interfaces.checkpoint import SaveGroup
from drivetrain_interfaces.errors import DrivetrainError
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

# Nobody else sees what is mounted here, and every user may go there.
io, home, said = DirectoryCheckpointIO(), "/mnt", {}

def attempt(name, function, *arguments, **options):
    try:
        function(*arguments, **options)
        said[name] = "done"
    except DrivetrainError as error:
        said[name] = f"{error.code} {error}"

def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True, timeout=30)

small, large = {"t": torch.ones(10_000), "n": 1}, {"t": torch.ones(1_000_000), "n": 2}
path = os.path.join(home, "x")
mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", home)
io.save(small, path)
attempt("full", io.save, large, path)
attempt("full later", lambda: io.begin_save(large, path).wait())
attempt("full together", io.save_sharded, large, path, SaveGroup(0, 1, "t"))
attempt("full convert", io.convert, path, os.path.join(home, "s"), "torch")
said["after full"] = [sorted(os.listdir(home)), io.verify(path), io.load(path)["n"]]
attempt("room again", io.save, {**small, "n": 3}, path)
attempt("full torch file", lambda: (
    io.save({"module": {"w": torch.ones(120_000)}}, os.path.join(home, "y")),
    io.convert(os.path.join(home, "y"), os.path.join(home, "z"), "torch"),
))
both = os.path.join(home, "y"), os.path.join(home, "z")
attempt("full safetensors", io.convert, *both, "safetensors")
said["after convert"] = sorted(os.listdir(home))
mount("-o", "remount,ro", home)
attempt("read-only", io.save, small, path)
attempt("read-only new", io.save, small, os.path.join(home, "new"))
attempt("read-only remove", io.remove, path)
attempt("read-only read", io.load, path)
mount("-o", "remount,rw", home)
os.mkdir(os.path.join(home, "private"), 0o700)
os.chmod(home, 0o755)
os.setuid(65534)
attempt("not ours", io.save, small, path)
attempt("not ours remove", io.remove, path)
attempt("hidden", io.load, os.path.join(home, "private", "x"))
attempt("hidden list", io.list, os.path.join(home, "private"))
said["after all"] = [sorted(os.listdir(home)), io.verify(path), io.load(path)["n"]]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs Linux and root, to mount")
    trial = subprocess.run(["unshare", "-m", "true"], timeout=30, check=False, capture_output=True)
    if trial.returncode:
        pytest.skip("this container may not mount")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", CHILD],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "how", ["full", "full later", "full together", "full torch file", "full safetensors"]
)
def test_a_full_disk_is_a_storage_error(said: dict[str, Any], how: str) -> None:
    assert said[how].startswith("DT402 "), said[how]
    assert "there is room" in said[how]


def test_a_full_disk_leaves_the_old_one_and_nothing_else(said: dict[str, Any]) -> None:
    assert said["after full"][0] in (["x"], ["s", "x"])
    assert said["after full"][1:] == [[], 1]
    assert said["room again"] == "done"
    assert "z" not in said["after convert"]
    assert not [name for name in said["after convert"] if name.startswith(".")]


@pytest.mark.parametrize("how", ["read-only", "read-only new", "read-only remove"])
def test_a_read_only_file_system_is_a_storage_error(said: dict[str, Any], how: str) -> None:
    assert said[how].startswith("DT402 ")
    assert "Read-only file system" in said[how]
    assert said["read-only read"] == "done"


@pytest.mark.parametrize("how", ["not ours", "not ours remove", "hidden list"])
def test_a_directory_of_somebody_else_is_a_storage_error(said: dict[str, Any], how: str) -> None:
    assert said[how].startswith("DT402 "), said[how]
    assert "Permission denied" in said[how]
    assert said["after all"][1:] == [[], 3]


def test_what_may_not_be_seen_is_not_there(said: dict[str, Any]) -> None:
    assert said["hidden"].startswith("DT40"), said["hidden"]


def test_an_error_of_the_disk_while_reading_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one fault that no file system here can be made to have."""
    io = DirectoryCheckpointIO()
    io.save({"t": torch.ones(3)}, str(tmp_path / "x"))

    def broken(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("drivetrain_toolkit.reading.fill", broken)
    for read in (io.load, io.inspect, io.exists, io.verify):
        with pytest.raises(StorageError, match="Input/output error"):
            read(str(tmp_path / "x"))


def test_a_slow_disk_does_not_stall_who_saves_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, steps = threading.Event(), 0
    fsync = os.fsync

    def wait(handle: int) -> None:
        assert slow.wait(60)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", wait)
    pending = DirectoryCheckpointIO().begin_save({"t": torch.ones(3)}, str(tmp_path / "x"))
    while steps < 1000:  # a training loop
        assert not pending.done()
        steps += 1
    slow.set()
    pending.wait()
    assert DirectoryCheckpointIO().exists(str(tmp_path / "x"))


def test_a_disk_that_takes_a_part_of_what_it_is_given_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short writes, at every size."""

    class Stingy:
        def __init__(self, file: Any) -> None:
            self.file = file
            self.turn = 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            self.turn += 1
            return int(self.file.write(data[: 1 + self.turn % 7]))

        def fileno(self) -> int:
            return int(self.file.fileno())

    def stingy(path: str, mode: str, buffering: int) -> Any:
        return Stingy(open(path, mode, buffering=buffering))

    monkeypatch.setattr(durable, "open", stingy, raising=False)
    size, digest = durable.write_file(str(tmp_path / "f"), lambda write: write(b"abc" * 1000))
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"abc" * 1000
    assert (size, digest) == (3000, durable.hash_file(str(tmp_path / "f")))
