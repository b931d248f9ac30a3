"""Files that are written past the page cache: the same bytes, whatever the disk does."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash
from drivetrain_interfaces.errors import StorageError

from drivetrain_toolkit import directfile, durable
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not directfile.OFFERED, reason="needs Linux")

MEGABYTES = 41


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes((MEGABYTES << 20) + 4099)


def written(path: Path, content: bytes, claimed: int | None = None) -> tuple[int, str]:
    def fill(write: Any) -> None:
        write(content[:77])
        rest = memoryview(bytearray(content[77:]))
        for start in range(0, len(rest), 3_000_001):
            write(rest[start : start + 3_000_001])

    size = len(content) if claimed is None else claimed
    return durable.write_file(str(path), fill, size)


@pytest.mark.parametrize("claimed", [None, MEGABYTES << 20, 60 << 20])
def test_every_byte_is_written_once_and_hashed(
    tmp_path: Path, content: bytes, claimed: int | None
) -> None:
    """However many were announced."""
    size, digest = written(tmp_path / "f", content, claimed)
    assert size == len(content)
    assert digest == xxhash.xxh3_128_hexdigest(content)
    assert (tmp_path / "f").read_bytes() == content


def test_short_writes_and_refusals_of_a_disk_change_nothing(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, turn = os.pwrite, iter(range(10**9))

    def stingy(handle: int, data: memoryview, begin: int) -> int:
        number = next(turn)
        if number == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(handle, data[: 4096 * (1 + number) + 7 * (number > 5)], begin)

    monkeypatch.setattr(os, "pwrite", stingy)
    assert written(tmp_path / "f", content)[1] == xxhash.xxh3_128_hexdigest(content)
    assert (tmp_path / "f").read_bytes() == content


def test_a_file_system_that_knows_no_direct_writing_gets_the_same_file(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        handle = opening(path, flags, mode)
        if flags & directfile._DIRECT:
            os.close(handle)
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return handle

    monkeypatch.setattr(os, "open", refusing)
    written(tmp_path / "f", content)
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_what_a_disk_refuses_in_the_middle_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    io = DirectoryCheckpointIO()
    io.save({"n": 1}, str(tmp_path / "x"))
    pwrite, turn = os.pwrite, iter(range(10**9))

    def broken(handle: int, data: memoryview, begin: int) -> int:
        if next(turn) >= 5:
            raise OSError(number, os.strerror(number))
        return pwrite(handle, data, begin)

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(StorageError, match=os.strerror(number)):
        io.save({"t": torch.ones(MEGABYTES << 18)}, str(tmp_path / "x"))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"]
    assert io.load(str(tmp_path / "x")) == {"n": 1}


@pytest.fixture
def no_large_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.usefixtures("no_large_files")
def test_a_file_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File too large"):
        DirectoryCheckpointIO().save({"t": torch.ones(MEGABYTES << 18)}, str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_an_error_of_who_fills_it_is_the_one_that_is_raised(tmp_path: Path) -> None:
    def fill(write: Any) -> None:
        write(bytes(9 << 20))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        durable.write_file(str(tmp_path / "f"), fill, MEGABYTES << 20)


def test_a_large_checkpoint_comes_back(tmp_path: Path) -> None:
    io = DirectoryCheckpointIO()
    tree = {"large": torch.randn(MEGABYTES << 18), "odd": torch.arange(5, dtype=torch.int8)}
    io.save(tree, str(tmp_path / "x"))
    assert io.verify(str(tmp_path / "x")) == []
    found = io.load(str(tmp_path / "x"))
    assert all(torch.equal(found[name], each) for name, each in tree.items())
