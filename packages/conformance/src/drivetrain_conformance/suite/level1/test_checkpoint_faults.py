"""A checkpoint exists completely or does not exist, whatever happens while it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import CheckpointError, StorageError

from drivetrain_conformance.outcomes import NOT_HERE
from drivetrain_conformance.support import saving
from drivetrain_conformance.support.messages import refused

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain_interfaces import Backend, CheckpointIO

    from drivetrain_conformance.target import Target

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def faults(
    backend: Backend, target: Target, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What ``support.saving`` found, in one process for all tests."""
    assert backend is not None
    if not hasattr(os, "fork"):
        pytest.skip(f"{NOT_HERE}processes cannot be forked")
    folder = tmp_path_factory.mktemp("faults")
    question = {
        "backend": target.backend.entry_point or target.backend.reference,
        "folder": str(folder),
        "path": sys.path,
    }
    done = subprocess.run(  # noqa: S603 - our own interpreter and script
        [sys.executable, saving.__file__, json.dumps(question)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"K4: saving under faults ended badly: {done.stderr[-3000:]}"
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_a_first_save_that_is_killed_leaves_all_or_nothing(faults: dict[str, Any]) -> None:
    """At every point at which the disk is touched.

    R: K3, K4
    """
    found = faults["new"]["found"]
    wrong = {n: what for n, what in enumerate(found, 1) if what not in {"nothing", "2"}}
    assert not wrong, (
        "K3: a checkpoint exists completely or does not exist; after a kill -9 at these of "
        f"{len(found)} points there was: {wrong}"
    )


def test_a_replacing_save_that_is_killed_leaves_the_old_or_the_new(
    faults: dict[str, Any],
) -> None:
    """At no moment is there neither.

    R: K3, K4
    """
    found = faults["replaced"]["found"]
    wrong = {n: what for n, what in enumerate(found, 1) if what not in {"1", "2"}}
    assert not wrong, (
        "K3: when a checkpoint is replaced there is the old or the new one, at every moment; after "
        f"a kill -9 at these of {len(found)} points there was: {wrong}"
    )


@pytest.mark.parametrize("which", ["new", "replaced"])
def test_drafts_of_killed_processes_are_deleted(faults: dict[str, Any], which: str) -> None:
    """By the next save, which works.

    R: K4
    """
    told = faults[which]
    assert told["finally"] == "3", f"K4: a save after a killed one works; it gave {told['finally']}"
    assert told["left"] == ["c.ckpt"], (
        f"K4: drafts of killed processes are deleted by the next save; left are {told['left']}"
    )


def test_a_save_without_room_is_a_storage_error(faults: dict[str, Any]) -> None:
    """And what was there before is still there.

    R: K4
    """
    told = faults["full"]
    assert told[0]["code"] != saving.SAVED, "K4: a save into no room at all does not succeed"
    for attempt in told:
        room, code = attempt["room"], attempt["code"]
        assert code in {saving.SAVED, saving.STORAGE_ERROR}, (
            f"K4: refusals by the system are a StorageError; with room for {room} bytes the save "
            f"ended with code {code}"
        )
        wanted = "2" if code == saving.SAVED else "1"
        assert attempt["found"] == wanted, (
            f"K4: a save that fails leaves what was there before; with room for {room} bytes "
            f"there is {attempt['found']}"
        )


def test_a_save_that_fails_leaves_nothing_behind(faults: dict[str, Any]) -> None:
    """A disk that is full must not become fuller.

    R: K4
    """
    for attempt in faults["full"]:
        assert attempt["left"] == ["c.ckpt"], (
            f"K4: a save that fails leaves what was there before and nothing else; with room for "
            f"{attempt['room']} bytes there is {attempt['left']}"
        )


def test_something_else_in_the_way_is_not_replaced(
    checkpoint_io: CheckpointIO, tmp_path: Path
) -> None:
    """Neither a file nor a folder with other things in it.

    R: K4
    """
    file, folder = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    file.write_text("the user's own")
    folder.mkdir()
    (folder / "notes.txt").write_text("the user's own")
    for path in (file, folder):
        rule = "K4: save replaces nothing that is not a checkpoint"
        with refused((CheckpointError, StorageError), naming=path.name, rule=rule):
            checkpoint_io.save({"a": 1}, str(path))
        rule = "K4: remove removes nothing that is not a checkpoint"
        with refused((CheckpointError, StorageError), naming=path.name, rule=rule):
            checkpoint_io.remove(str(path))
    assert file.read_text() == "the user's own", "K4: what is not a checkpoint stays"
    assert (folder / "notes.txt").read_text() == "the user's own", "K4: so does a folder"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"], (
        "K4: a save that fails leaves what was there before and nothing else"
    )


def test_a_folder_that_cannot_be_made_is_a_storage_error(
    checkpoint_io: CheckpointIO, tmp_path: Path
) -> None:
    """Here because a file has its name.

    R: K4
    """
    (tmp_path / "runs").write_text("a file")
    rule = "K4: refusals by the system are a StorageError"
    with refused(StorageError, naming="runs", rule=rule):
        checkpoint_io.save({"a": 1}, str(tmp_path / "runs" / "c.ckpt"))


def test_removing_what_is_missing_is_no_error(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """Whoever cleans up need not know who did before.

    R: K4
    """
    path = str(tmp_path / "c.ckpt")
    checkpoint_io.remove(path)
    checkpoint_io.save({"a": torch.ones(2)}, path)
    checkpoint_io.remove(path)
    assert not checkpoint_io.exists(path), "K4: what was removed does not exist"
    assert list(tmp_path.iterdir()) == [], "K4: remove leaves nothing behind"


def test_a_missing_checkpoint_is_refused_by_name(
    checkpoint_io: CheckpointIO, tmp_path: Path
) -> None:
    """Loading it is not a question of the system.

    R: K5
    """
    path = tmp_path / "absent.ckpt"
    assert not checkpoint_io.exists(str(path)), "K5: what is missing does not exist"
    rule = "K5: a missing checkpoint is a CheckpointError with its path"
    with refused(CheckpointError, naming=r"absent\.ckpt", rule=rule):
        checkpoint_io.load(str(path))
