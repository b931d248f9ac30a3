"""Ranks that hang, run out of memory or of data: why, and where everybody was, is told at once."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain import Trainer
from drivetrain_interfaces import DataError, ProcessFailedError
from drivetrain_toolkit.strategies import DDPStrategy
from training_parts import Regression, loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Running, Starter

#: From the moment that a failure is noticed to the end of the last process, in seconds.
PROMISED = 10.0
HOST = socket.gethostname()


def _harm(start: Starter, what: str, rank: int, launcher: str, **options: Any) -> Running:
    """A run in which ``rank`` comes to harm in its second epoch, at step 8."""
    asked: dict[str, Any] = {
        "out": str(start.folder),
        "at": [[what, rank, 1, 2]],
        "trainer": {
            "devices": 2, "launcher": launcher, "max_epochs": 1000, "hang_timeout": 4.0,
            "log_every_n_steps": 1000,
        },
        "model": {"optimizer": "sgd"},
        "data": options.pop("data", {}),
    }  # fmt: skip
    return start("train.py", json.dumps(asked), **options)


def _both_tore_down(folder: Path) -> bool:
    lines = [(folder / f"events-{rank}.jsonl").read_text().splitlines()[-1] for rank in (0, 1)]
    return all(json.loads(line)["event"] == "teardown" for line in lines)


def test_a_hang_is_noticed_told_with_all_stacks_and_ended(start: Starter) -> None:
    running = _harm(start, "hang", 1, "fork")
    running.wait_for("here")
    since = time.monotonic()
    assert running.finish(within=60) == 1
    assert time.monotonic() - since < 4.0 + PROMISED + 5, "five for a loaded machine"
    assert running.left_behind() == []
    errors = running.errors
    assert "No rank made progress for 4 s" in errors
    assert f"rank 0 on {HOST!r} at epoch 1, step 8 waited in backward" in errors
    assert f"rank 1 on {HOST!r} at epoch 1, step 8 was in on_train_batch_start" in errors
    assert f"Stack of rank 0 on {HOST!r}" in errors
    assert f"Stack of rank 1 on {HOST!r}" in errors
    assert errors.count("time.sleep(ENDLESS_SECONDS)") >= 1
    assert "[DT302]" in errors
    assert _both_tore_down(start.folder)


def test_a_rank_that_runs_out_of_memory_is_named_with_what_to_do(start: Starter) -> None:
    running = _harm(start, "memory", 1, "fork")
    assert running.finish(within=60) == 1
    assert f"because rank 1 on {HOST!r} at epoch 1, step 8 raised RuntimeError" in running.errors
    assert "can't allocate memory" in running.errors
    assert "Give rank 1 less to hold" in running.errors
    assert _both_tore_down(start.folder)


def test_under_torchrun_the_other_ranks_say_who_failed_first(start: Starter) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    running = _harm(start, "raise", 1, "auto", by=torchrun)
    assert running.finish() != 0
    assert running.left_behind() == []
    told = f"because rank 1 on {HOST!r} at epoch 1, step 8 raised LookupError: rank 1 lost its way"
    assert told in running.errors
    assert "When rank 1 failed: rank 0" in running.errors
    assert _both_tore_down(start.folder)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group that may have 256 MB."""
    made = None
    for folder, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", folder, f"drivetrain-test-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            made = group
            if (group / limit).exists() and (group / "cgroup.procs").exists():
                (group / limit).write_text(str(1 << 28))
                break
            group.rmdir()
            made = None
    if made is None:
        pytest.skip("no control group with a limit of memory can be made here")
    yield made
    deadline = time.monotonic() + 10
    while made.exists():  # until the kernel has buried its last process
        with suppress(OSError):
            made.rmdir()
        assert time.monotonic() < deadline


def test_a_rank_that_the_kernel_kills_for_its_memory_is_named(
    start: Starter, memory_group: Path
) -> None:
    """By a real control group, as in a container."""
    env = {"TEST_MEMORY_GROUP": str(memory_group)}
    running = _harm(start, "group-memory", 1, "script", env=env)
    running.wait_for("here")
    since = time.monotonic()
    assert running.finish(within=PROMISED + 5) == 1
    assert running.left_behind(within=PROMISED + 5 - (time.monotonic() - since)) == []
    assert "rank 1 " in running.errors
    assert "was ended by SIGKILL" in running.errors
    assert "the kernel does so when memory is out" in running.errors
    last = (start.folder / "events-0.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "teardown"


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "rank"),
    [
        ("kill", 1),
        ("raise", 0),
        pytest.param("raise", 1, marks=_slow),
        pytest.param("kill", 0, marks=_slow),
        pytest.param("exit", 1, marks=_slow),
        pytest.param("memory", 1, marks=_slow),
        pytest.param("hang", 0, marks=_slow),
        pytest.param("hang", 1, marks=_slow),
    ],
)
def test_nothing_is_left_of_a_run_that_failed(start: Starter, what: str, rank: int) -> None:
    """No process, no port, no shared memory, and no temporary file."""
    temporary = start.folder / "temporary"
    temporary.mkdir()
    before = _shared_memory()
    running = _harm(
        start, what, rank, "script", env={"TMPDIR": str(temporary)}, data={"workers": 1}
    )
    ((_, port),) = running.wait_for("port")
    running.wait_for("here")
    since = time.monotonic()
    noticed = 4.0 if what == "hang" else 0.0
    assert running.finish(within=30) != 0
    left = noticed + PROMISED + 5 - (time.monotonic() - since)
    assert running.left_behind(within=left) == []
    with socket.socket() as knocking:
        assert knocking.connect_ex(("127.0.0.1", int(port))) == errno.ECONNREFUSED
    assert [path for path in temporary.iterdir() if path.name.startswith("drivetrain")] == []
    assert {name for name in _shared_memory() - before if "torch" in name} == set()


class Uneven:
    """An iterable that gives another number of batches on each rank."""

    def __init__(self, trainer: list[Trainer], counts: tuple[int, int]) -> None:
        self.trainer, self.counts = trainer, counts

    def __iter__(self) -> Iterator[Any]:
        data = list(loader())
        yield from data[: self.counts[self.trainer[0].world.rank]]


def _fit_uneven(data: Any, where: list[Trainer], strategy: Any = None) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=2, launcher="fork", max_epochs=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, strategy=strategy,
    )  # fmt: skip
    where.append(trainer)
    trainer.fit(Regression("sgd"), data)


@pytest.mark.parametrize("counts", [(3, 5), (5, 3), (3, 4)])
def test_loaders_of_unequal_length_are_named_and_no_rank_hangs(counts: tuple[int, int]) -> None:
    where: list[Trainer] = []
    short = counts.index(3)
    with pytest.raises(ProcessFailedError) as caught:
        _fit_uneven(Uneven(where, counts), where)
    text = str(caught.value)
    assert "DataError" in text
    assert f"train loader of rank {short} ended after 3 steps of epoch 0, and rank" in text


def test_ranks_that_seldom_meet_are_told_of_unequal_loaders_too() -> None:
    where: list[Trainer] = []
    strategy = DDPStrategy(averaging_period=4)
    with pytest.raises(ProcessFailedError, match="train loader of rank 0 ended after 3 steps"):
        _fit_uneven(Uneven(where, (3, 5)), where, strategy)


def test_loaders_of_equal_but_unknown_length_are_fine() -> None:
    where: list[Trainer] = []
    _fit_uneven(Uneven(where, (4, 4)), where)
    assert where[0].global_step == 12


class Sized(Uneven):
    """The same, and it says how many."""

    def __len__(self) -> int:
        return self.counts[self.trainer[0].world.rank]


def test_lengths_that_differ_are_refused_before_the_first_step() -> None:
    where: list[Trainer] = []
    with pytest.raises((ProcessFailedError, DataError), match=r"ranks have \[3, 5\] batches"):
        _fit_uneven(Sized(where, (3, 5)), where)
