"""Hashes by a second thread: the same, whatever the size, and no thread is left."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
import xxhash

from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.hashing import Hashing
from drivetrain_toolkit.tensorfile import pieces

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("size", [0, 100, 1 << 24])
def test_the_hash_is_that_of_all_pieces_in_order(size: int) -> None:
    data = bytes(range(100))[:size] if size <= 100 else b"x" * size
    with Hashing(size) as hashing:
        for start in range(0, size, 1 << 20):
            hashing.update(memoryview(data)[start : start + (1 << 20)])
        assert hashing.hexdigest() == xxhash.xxh3_128_hexdigest(data)


def test_no_thread_is_left_after_an_error() -> None:
    before = threading.active_count()

    def fail() -> None:
        with Hashing(1 << 30) as hashing:
            hashing.update(b"a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert threading.active_count() == before


def test_a_view_keeps_the_memory_of_its_tensor() -> None:
    (view,) = pieces(torch.full((1000,), 7, dtype=torch.uint8))
    others = [torch.zeros(1000, dtype=torch.uint8) for _ in range(100)]
    assert bytes(view) == b"\x07" * 1000
    assert len(others) == 100


def test_damage_of_a_large_file_is_found_by_both_readers(tmp_path: Path) -> None:
    """One bit in each of several places of 20 MB."""
    io = DirectoryCheckpointIO()
    io.save({"w": torch.randn(5_000_000)}, str(tmp_path / "x"))
    assert io.verify(str(tmp_path / "x")) == []
    file = tmp_path / "x" / "tensors.safetensors"
    for place in (200, 5_000_000, 19_999_999):
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 8]))
        assert io.verify(str(tmp_path / "x")) != []
        with pytest.raises(ValueError, match="not what was written"):
            io.load(str(tmp_path / "x"))
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(bytes([byte]))
    assert io.load(str(tmp_path / "x"))["w"].shape == (5_000_000,)
