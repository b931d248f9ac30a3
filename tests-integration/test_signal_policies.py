"""What users may ask of a signal, and signals that come at an awkward moment."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain import Callback, Interrupted, SignalPolicy, Trainer
from drivetrain.callbacks import ModelCheckpoint
from drivetrain.loggers import CSVLogger
from training_parts import Recorder, Regression, loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Starter


class Raises(Callback):
    """Signals its own process when a hook is called: once, or twice.

    Args:
        hook: The hook; ``state_dict`` is called while a checkpoint is being made.
        numbers: The signals.
        rank: The rank that does it.
        after: Calls of the hook to wait for.
    """

    def __init__(self, hook: str, *numbers: int, rank: int = 0, after: int = 0) -> None:
        self.numbers, self.rank, self.left = numbers, rank, after
        self.said: list[str] = []
        setattr(self, hook, self._go)
        self.world = 0

    def _go(self, trainer: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if trainer is not None:
            self.world = trainer.world.rank
        self.left -= 1
        if self.left == -1 and self.world == self.rank:
            for number in self.numbers:
                signal.raise_signal(number)
        return {}

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.said.append("teardown")


def _trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    given = {"max_epochs": 50, "accelerator": "cpu", "logger": False, "callbacks": [*callbacks]}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    saving = ModelCheckpoint(dirpath=folder / "saved", every_n_train_steps=4)
    given["callbacks"].append(saving)
    return Trainer(**{**given, **quiet, **settings})


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saved").glob("*.ckpt"))


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCONT]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("action", "names"), [("save", ["epoch=0-step=6.ckpt"]), ("stop", [])])
def test_a_stop_saves_if_the_policy_says_so(tmp_path: Path, action: str, names: list[str]) -> None:
    raises = Raises("on_train_batch_end", signal.SIGTERM, after=5)
    trainer = _trainer(tmp_path, raises, signals=action)
    with pytest.raises(Interrupted) as caught:
        trainer.fit(Regression("sgd"), loader())
    assert caught.value.code == 143
    assert [name for name in _saved(tmp_path) if "step=6" in name] == names
    assert raises.said == ["teardown"]


class Ending(CSVLogger):
    """Keeps how its run ended."""

    ended = ""

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.ended = status


def test_a_stopped_run_says_so_to_its_loggers_and_writes_what_they_hold(tmp_path: Path) -> None:
    logger = Ending(flush_every_n_rows=1000, flush_after_seconds=1000.0)
    raises = Raises("on_train_batch_end", signal.SIGTERM, after=5)
    trainer = _trainer(
        tmp_path, raises, logger=logger, log_every_n_steps=1, default_root_dir=tmp_path
    )
    with pytest.raises(Interrupted):
        trainer.fit(Regression("sgd"), loader())
    assert logger.ended == "interrupted"
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 6, "a line of names, and one for each step"


def test_an_ignored_signal_changes_nothing(tmp_path: Path) -> None:
    raises = Raises("on_train_batch_end", signal.SIGTERM, after=2)
    trainer = _trainer(tmp_path, raises, signals={"SIGTERM": "ignore"}, max_epochs=1)
    trainer.fit(Regression("sgd"), loader())
    assert trainer.global_step == 12
    assert trainer.interrupted is None


def test_a_signal_during_a_save_lets_the_save_finish(tmp_path: Path) -> None:
    raises = Raises("state_dict", signal.SIGTERM)
    trainer = _trainer(tmp_path, raises)
    with pytest.raises(Interrupted):
        trainer.fit(Regression("sgd"), loader())
    assert trainer.global_step == 4
    assert _saved(tmp_path) == ["epoch=0-step=4.ckpt"]
    assert raises.said == ["teardown"]


@pytest.mark.parametrize(
    ("hook", "ranks"),
    [("setup", 1), ("setup", 2), ("on_train_start", 2), ("on_train_epoch_start", 2)],
)
def test_a_signal_during_set_up_stops_all_ranks_before_the_first_step_and_tears_down(
    tmp_path: Path, hook: str, ranks: int
) -> None:
    raises = Raises(hook, signal.SIGTERM, rank=ranks - 1)
    recorder = Recorder(str(tmp_path))
    trainer = _trainer(tmp_path, raises, recorder, devices=ranks, launcher="fork")
    with pytest.raises(Interrupted) as caught:
        trainer.fit(Regression("sgd"), loader(), loader(16, shuffle=False))
    assert caught.value.code == 143
    assert trainer.global_step == 0
    assert trainer.interrupted is signal.SIGTERM
    for rank in range(ranks):
        lines = (tmp_path / f"events-{rank}.jsonl").read_text().splitlines()
        names = [json.loads(line)["event"] for line in lines]
        assert names[-1] == "teardown"
        assert "batch" not in names


def test_a_signal_after_the_last_step_ends_the_process_when_the_run_is_over(
    tmp_path: Path,
) -> None:
    raises = Raises("on_fit_end", signal.SIGTERM)
    trainer = _trainer(tmp_path, raises, max_epochs=1)
    with pytest.raises(Interrupted):
        trainer.fit(Regression("sgd"), loader())
    assert trainer.global_step == 12
    assert raises.said == ["teardown"]


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_ranks_stop_inside_a_long_evaluation(tmp_path: Path, stage: str) -> None:
    """No rank waits for the others at its end, and none for the end itself."""
    raises = Raises("on_validation_batch_end", signal.SIGTERM, rank=1, after=5)
    trainer = _trainer(
        tmp_path, raises, devices=2, launcher="fork", num_sanity_val_steps=0,
        limit_train_batches=1,
    )  # fmt: skip
    endless = loader(4_000_000, 1, shuffle=False)
    model = Regression("sgd")
    run = partial(trainer.fit, model, loader(), endless)
    if stage == "validate":
        run = partial(trainer.validate, model, endless)
    with pytest.raises(Interrupted) as caught:
        run()
    assert caught.value.code == 143


def test_a_requeued_job_is_saved_and_torn_down_before_the_scheduler_is_asked(
    tmp_path: Path,
) -> None:
    """The scheduler answers with SIGTERM at once, which must not spoil the exit code."""
    asked = tmp_path / "asked.txt"
    code = (
        f"import os, pathlib, signal; os.kill({os.getpid()}, signal.SIGTERM);"
        f"p = pathlib.Path({str(asked)!r}); p.write_text('again')"
    )
    policy = SignalPolicy({"SIGUSR1": "requeue"}, requeue_command=(sys.executable, "-c", code))
    raises = Raises("on_train_batch_end", signal.SIGUSR1, signal.SIGTERM, after=5)
    trainer = _trainer(tmp_path, raises, signals=policy)
    with pytest.raises(Interrupted) as caught:
        trainer.fit(Regression("sgd"), loader())
    assert caught.value.code == 128 + signal.SIGUSR1
    assert asked.read_text() == "again"
    assert raises.said == ["teardown"]
    assert "epoch=0-step=6.ckpt" in _saved(tmp_path)


def test_a_job_of_lsf_is_requeued_by_the_command_of_lsf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program of that name which writes down its arguments: there is no LSF here."""
    program = tmp_path / "bin" / "brequeue"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked.txt\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LSB_JOBID", "812")
    monkeypatch.setenv("LSB_JOBINDEX", "3")
    raises = Raises("on_train_batch_end", signal.SIGUSR2, after=5)
    trainer = _trainer(tmp_path, raises, signals={"SIGUSR2": "requeue"})
    with pytest.raises(Interrupted) as caught:
        trainer.fit(Regression("sgd"), loader())
    assert caught.value.code == 128 + signal.SIGUSR2
    assert (tmp_path / "asked.txt").read_text() == "812[3]\n"
    assert raises.said == ["teardown"]
    assert "epoch=0-step=6.ckpt" in _saved(tmp_path)


def _endless(folder: Path, launcher: str, signals: Any) -> str:
    settings = {"max_epochs": 1_000_000, "devices": 2, "launcher": launcher, "signals": signals}
    asked = {
        "out": str(folder),
        "model": {"total_steps": 1_000_000, "optimizer": "sgd"},
        "trainer": settings,
        "checkpoint": {"dirpath": str(folder / "saved"), "every_n_epochs": 1_000_000},
        "at": [["say", None, 0, 2]],
    }
    return json.dumps(asked)


def test_a_warning_signal_to_the_process_that_was_started_is_one_for_the_run(
    start: Starter,
) -> None:
    """As ``scancel --signal=USR1`` or ``bsub -wa USR1`` send it, here to the ranks' parent."""
    running = start("train.py", _endless(start.folder, "fork", {"SIGUSR1": "save"}))
    running.wait_for("here", 2)
    os.kill(running.process.pid, signal.SIGUSR1)
    assert running.finish() == 128 + signal.SIGUSR1, running.output
    assert running.left_behind() == []
    assert len(_saved(start.folder)) == 1


def test_torchrun_that_is_told_to_stop_leaves_a_checkpoint(start: Starter) -> None:
    running = start(
        "train.py",
        _endless(start.folder, "auto", None),
        by=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )
    running.wait_for("here", 2)
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.finish() != 0
    assert running.left_behind() == []
    assert len(_saved(start.folder)) == 1
    for rank in (0, 1):
        lines = (start.folder / f"events-{rank}.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "teardown"


class Counts(Callback):
    """Counts collectives and reads of device values, on all threads, while training."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.start()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.profile.stop()
        names = [event.name for event in self.profile.events()]
        found = {
            "collectives": sum(name.startswith("c10d::") for name in names),
            "reads": sum(name == "aten::_local_scalar_dense" for name in names),
        }
        path = Path(self.folder, f"{trainer.max_steps}-{trainer.world.rank}.json")
        path.write_text(json.dumps(found))
        del self.profile


def test_being_ready_for_signals_costs_no_collective_and_no_read_per_step(tmp_path: Path) -> None:
    counts = {}
    for steps in (20, 60):
        trainer = Trainer(
            accelerator="cpu", devices=2, launcher="fork", max_steps=steps, logger=False,
            callbacks=[Counts(str(tmp_path))], log_every_n_steps=10_000, nan_loss="ignore",
            enable_progress_bar=False, enable_model_summary=False,
            signals=SignalPolicy({"SIGUSR1": "save"}, deadline=100),
        )  # fmt: skip
        trainer.fit(Regression("sgd"), loader(960))
        counts[steps] = json.loads((tmp_path / f"{steps}-1.json").read_text())
    assert counts[60]["collectives"] - counts[20]["collectives"] == 40, "the gradients', one a step"
    assert counts[60]["reads"] == counts[20]["reads"]


def test_ten_runs_stopped_anywhere_end_and_go_on(start: Starter) -> None:
    """``nox -s signals`` does it a hundred times, also with the script launcher."""
    folder = str(start.folder / "runs")
    running = start("stop_anywhere.py", folder, "10", "fork", env={"OMP_NUM_THREADS": "1"})
    code = running.finish(within=400)
    print(running.lines[-1] if running.lines else running.errors)
    assert code == 0, running.output
    assert "10 runs" in running.lines[-1]
    assert "0 hangs, 0 wrong" in running.lines[-1]
