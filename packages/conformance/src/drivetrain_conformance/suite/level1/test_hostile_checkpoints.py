"""Files from somewhere: damaged ones are named, and hostile ones run nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import CheckpointError, DrivetrainError

from drivetrain_conformance.support.messages import refused

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain_interfaces import CheckpointIO

FLIPS_PER_FILE = 48


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.makedirs, (self.mark,)


@pytest.fixture
def saved(checkpoint_io: CheckpointIO, tmp_path: Path) -> Path:
    """A good checkpoint."""
    path = tmp_path / "c.ckpt"
    checkpoint_io.save({"weight": torch.arange(32.0), "names": ["a", "b"], "epoch": 3}, str(path))
    return path


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint. Its layout is another test's matter."""
    found = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    assert found, "K1: a checkpoint has files"
    return found


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_under_the_name_is_refused(
    checkpoint_io: CheckpointIO, tmp_path: Path, kind: str
) -> None:
    """It runs nothing, and the text says what to do.

    R: K7, K8
    """
    path, mark = tmp_path / "c.ckpt", tmp_path / "ran"
    if kind == "torch":
        torch.save({"a": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    rule = "K7: a single file of torch.save, or a pickle, is refused with what to do"
    with refused(CheckpointError, naming=r"c\.ckpt", rule=rule):
        checkpoint_io.load(str(path))
    assert not mark.exists(), "K8: loading runs no code from the files; this one ran"


def test_pickles_inside_are_refused(
    checkpoint_io: CheckpointIO, saved: Path, tmp_path: Path
) -> None:
    """In place of each of the files.

    R: K5, K8
    """
    mark = tmp_path / "ran"
    for file in files_of(saved):
        kept = file.read_bytes()
        file.write_bytes(pickle.dumps(Bomb(mark)))
        with refused(CheckpointError, naming=".", rule=f"K5: {file.name} is not what was written"):
            checkpoint_io.load(str(saved))
        assert not mark.exists(), f"K8: loading runs no code from {file.name}; it ran"
        file.write_bytes(kept)
    checkpoint_io.load(str(saved))


def test_every_flipped_bit_is_noticed(checkpoint_io: CheckpointIO, saved: Path) -> None:
    """In every file, all over it.

    R: K5
    """
    unnoticed = []
    for file in files_of(saved):
        kept = file.read_bytes()
        stride = max(1, len(kept) // FLIPS_PER_FILE)
        for place in range(0, len(kept), stride):
            flipped = bytearray(kept)
            flipped[place] ^= 1 << (place % 8)
            file.write_bytes(bytes(flipped))
            try:
                checkpoint_io.load(str(saved))
                unnoticed.append(f"{file.name} at byte {place}")
            except CheckpointError:
                pass
        file.write_bytes(kept)
    assert not unnoticed, (
        f"K5: one flipped bit is enough for a CheckpointError; these were not noticed: {unnoticed}"
    )


def test_a_truncated_file_is_named(checkpoint_io: CheckpointIO, saved: Path) -> None:
    """To any length, also none.

    R: K5
    """
    for file in files_of(saved):
        kept = file.read_bytes()
        for length in (0, 1, len(kept) // 2, len(kept) - 1):
            file.write_bytes(kept[:length])
            rule = f"K5: {file.name} cut to {length} of {len(kept)} bytes is a CheckpointError"
            with refused(CheckpointError, naming=file.name, rule=rule):
                checkpoint_io.load(str(saved))
        file.write_bytes(kept)


def test_a_file_that_grew_is_named(checkpoint_io: CheckpointIO, saved: Path) -> None:
    """Something was added at its end.

    R: K5
    """
    for file in files_of(saved):
        kept = file.read_bytes()
        file.write_bytes(kept + b"\n")
        rule = f"K5: {file.name} that grew is a CheckpointError that names it"
        with refused(CheckpointError, naming=file.name, rule=rule):
            checkpoint_io.load(str(saved))
        file.write_bytes(kept)


def test_a_missing_or_an_extra_file_is_named(checkpoint_io: CheckpointIO, saved: Path) -> None:
    """And what is incomplete does not exist.

    R: K5
    """
    for file in files_of(saved):
        kept = file.read_bytes()
        file.unlink()
        assert not checkpoint_io.exists(str(saved)), f"K5: without {file.name} it does not exist"
        rule = f"K5: a checkpoint without {file.name} is a CheckpointError that names it"
        with refused(CheckpointError, naming=file.name, rule=rule):
            checkpoint_io.load(str(saved))
        file.write_bytes(kept)
    (saved / "extra.bin").write_bytes(b"")
    with refused(CheckpointError, naming=r"extra\.bin", rule="K5: an extra file is named"):
        checkpoint_io.load(str(saved))


def test_links_and_folders_are_refused(
    checkpoint_io: CheckpointIO, saved: Path, tmp_path: Path
) -> None:
    """Even if what they lead to is right: they could lead anywhere.

    R: K6
    """
    for file in files_of(saved):
        outside = tmp_path / "outside.bin"
        shutil.copy(file, outside)
        kept = file.read_bytes()
        file.unlink()
        file.symlink_to(outside)
        rule = f"K6: {file.name} as a link is refused"
        with refused(CheckpointError, naming=file.name, rule=rule):
            checkpoint_io.load(str(saved))
        file.unlink()
        file.mkdir()
        with refused(DrivetrainError, naming=file.name, rule=f"K6: {file.name} as a folder"):
            checkpoint_io.load(str(saved))
        file.rmdir()
        file.write_bytes(kept)


@pytest.mark.parametrize("name", ["../state.json", "/etc/hostname", "sub/state.json"])
def test_other_names_in_the_manifest_are_refused(
    checkpoint_io: CheckpointIO, saved: Path, name: str
) -> None:
    """Only the three plain files are read.

    R: K6
    """
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text("ascii"))
    manifest["files"][name] = manifest["files"].pop("state.json")
    path.write_text(json.dumps(manifest, indent=1))
    with refused(CheckpointError, naming=".", rule=f"K6: the name {name!r} is refused"):
        checkpoint_io.load(str(saved))


def test_a_later_format_is_refused(checkpoint_io: CheckpointIO, saved: Path) -> None:
    """With its version, and what to do.

    R: K7
    """
    path = saved / "manifest.json"
    text = path.read_text("ascii")
    assert '"version": 1' in text, "K2: the manifest states format version 1"
    path.write_text(text.replace('"version": 1', '"version": 97'))
    rule = "K7: a later format version is refused with what to do"
    with refused(CheckpointError, naming="97", rule=rule):
        checkpoint_io.load(str(saved))


def test_a_deep_tree_does_not_end_the_process(checkpoint_io: CheckpointIO, saved: Path) -> None:
    """JSON that nests a hundred thousand times is not what was written.

    R: K5
    """
    (saved / "state.json").write_text("[" * 100_000 + "]" * 100_000)
    with refused(CheckpointError, naming="state", rule="K5: a changed file is a CheckpointError"):
        checkpoint_io.load(str(saved))
