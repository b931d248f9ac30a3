"""Train, kill -9, look at what is on the disk, resume, until so many processes have been killed.

``python kills.py --kills 200``. A run is as many lives as it takes to train to the end; each life
is a child forked from this process, which has imported everything and computes nothing. A life is
killed inside a step, or in the middle of staging, writing, committing, linking or pruning a
checkpoint (at the n-th time that it gets there), or at any time. After each death the directory
must hold whole checkpoints only, among them what had been reported as saved. What each life did
must be a piece of what an undisturbed run does, bit for bit, and the last must get to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from drivetrain import Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from torch.optim import optimizer as optimizers
from training_parts import Recorder, Regression, loader, parameters_of

EPOCHS = 2
#: How a run trains; each is compared with an undisturbed run of its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "every step": {"checkpoint": {"every_n_train_steps": 1, "save_top_k": 2, "save_last": True}},
    "in the background": {
        "checkpoint": {"every_n_train_steps": 2, "save_top_k": 2, "asynchronous": True},
    },
    "best of validations": {
        "checkpoint": {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
        "trainer": {"val_check_interval": 3},
    },
    "windows": {
        "checkpoint": {"every_n_train_steps": 2, "save_top_k": 1},
        "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    },
}
#: About how often each point is passed for one checkpoint.
POINTS = {"step": 1, "stage": 1, "write": 3, "sync": 7, "commit": 2, "link": 1, "prune": 5}
PATIENCE = 100.0


class Death:
    """Kills this process when a point is passed for the n-th time.

    Args:
        point: One of ``POINTS``.
        count: How often it is passed.
    """

    def __init__(self, point: str, count: int) -> None:
        self.point = point
        self.left = count
        self.sync = os.fsync

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        optimizers.register_optimizer_step_pre_hook(lambda *_: self.at("step"))
        os.fsync = self._fsync

    def at(self, point: str) -> None:
        if point != self.point:
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
            self.at("write")
        elif event == "os.rename":
            self.at("commit")
        elif event == "os.symlink":
            self.at("link")
        elif event in {"os.remove", "os.rmdir", "shutil.rmtree"}:
            self.at("prune")

    def _fsync(self, handle: int) -> None:
        self.at("sync")
        self.sync(handle)


class Witness(Recorder):
    """Notes what happens, and which checkpoint was there when the run went on."""

    saves_checkpoints = True  # so that it comes after the one that saves

    def __init__(self, folder: str, saver: ModelCheckpoint, death: Death | None) -> None:
        super().__init__(folder)
        self.saver = saver
        self.death = death
        self.known = ""

    def state_dict(self) -> dict[str, Any]:
        if self.death is not None:
            self.death.at("stage")
        return super().state_dict()

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Any) -> None:
        newest = self.saver.last_model_path
        if newest != self.known:
            self.known = newest
            with Path(self.folder, "saved.txt").open("a") as file:
                file.write(f"{newest}\n")


def live(folder: Path, variant: str, death: Death | None) -> None:
    """One life: train to the end, from the last checkpoint that there is."""
    asked = VARIANTS[variant]
    seed_everything(7)
    saver = ModelCheckpoint(folder / "saved", **asked["checkpoint"])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        log_every_n_steps=4,
        callbacks=[saver, Witness(str(folder), saver, death)],
        **asked.get("trainer", {}),
    )
    model = Regression(total_steps=EPOCHS * 12)
    if death is not None:
        death.arm()
    trainer.fit(model, loader(), loader(16, shuffle=False), ckpt_path="last")
    done = {"step": trainer.global_step, "parameters": parameters_of(model)}
    Path(folder, "done.json").write_text(json.dumps(done), encoding="utf-8")


def fork(folder: Path, variant: str, death: Death | None = None) -> int:
    """Begin a life in a process and session of its own."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        live(folder, variant, death)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked child must never return
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, *, kill_after: float | None = None) -> int:
    """Its exit code, negative for a signal; it is killed after so many seconds."""
    begin = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        age = time.monotonic() - begin
        if age > PATIENCE or (kill_after is not None and age > kill_after):
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


class Run:
    """One training run of many lives.

    Args:
        folder: Where; empty.
        variant: How it trains.
        expected: The events and the result of the undisturbed run; None for that one itself.
    """

    def __init__(self, folder: Path, variant: str, expected: Run | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.variant = variant
        self.expected = expected
        self.verified = 0

    def lives(self) -> list[list[str]]:
        """The events of each life that got as far as training."""
        path = self.folder / "events-0.jsonl"
        found: list[list[str]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            if json.loads(line)["event"] == "train_start":
                found.append([])
            else:
                found[-1].append(line)
        return found

    def result(self) -> Any:
        """What the finished run has come to."""
        return json.loads((self.folder / "done.json").read_text())

    def check_disk(self) -> None:
        """Nothing half visible, nothing missing, nothing left behind."""
        saved = self.folder / "saved"
        visible = (
            [each for each in saved.iterdir() if each.name[0] != "."] if saved.exists() else []
        )
        checkpoint_io = DirectoryCheckpointIO()
        steps = []
        for each in visible:
            assert each.suffix == ".ckpt", f"{each.name} is no checkpoint"
            steps.append(checkpoint_io.load(str(each))["loop"]["global_step"])
            self.verified += 1
        reported = self._reported()
        assert max(steps, default=0) >= reported, f"step {reported} was reported: {visible}"
        asked = VARIANTS[self.variant]["checkpoint"]
        most = asked["save_top_k"] + 1 + 2 * asked.get("save_last", False)
        assert len(visible) <= most, f"{len(visible)} files, {most} at most: {visible}"

    def _reported(self) -> int:
        path = self.folder / "saved.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[-1].rpartition("step=")[2].split(".")[0].split("-")[0]) if lines else 0

    def check_events(self) -> int:
        """Every life did a piece of what the undisturbed run did; how many losses were compared."""
        assert self.expected is not None
        (whole,) = self.expected.lives()
        for events in self.lives():
            begin = whole.index(events[0]) if events else 0
            assert events == whole[begin : begin + len(events)], "\n".join(events)
        return sum('"batch"' in event for events in self.lives() for event in events)

    def check_end(self) -> None:
        """The last life got to the end, and to the same result."""
        assert self.expected is not None
        (whole,) = self.expected.lives()
        last = self.lives()[-1]
        assert last == whole[len(whole) - len(last) :], "the last life did not finish"
        assert self.result() == self.expected.result(), "other parameters"


class Driver:
    """Kills until it is enough."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.losses = self.verified = self.finished = 0
        self.references: dict[str, Run] = {}
        self.seconds = 1.0

    def reference(self, variant: str) -> Run:
        """The undisturbed run of a variant."""
        if variant not in self.references:
            run = Run(self.folder / f"whole-{len(self.references)}", variant)
            begin = time.monotonic()
            code = ended(fork(run.folder, variant))
            assert code == 0, (run.folder / "log.txt").read_text()
            self.seconds = time.monotonic() - begin
            self.references[variant] = run
        return self.references[variant]

    def run(self, kills: int) -> None:
        """Run after run, until so many lives were killed; the last run gets to its end."""
        number = 0
        while self.killed.total() < kills:
            variant = list(VARIANTS)[number % len(VARIANTS)]
            run = Run(self.folder / f"run-{number}", variant, self.reference(variant))
            while not self._live_and_die(run, self.killed.total() < kills):
                run.check_disk()
            run.check_disk()
            self.losses += run.check_events()
            run.check_end()
            self.verified += run.verified
            self.finished += 1
            shutil.rmtree(run.folder)
            number += 1

    def _live_and_die(self, run: Run, may_die: bool) -> bool:
        """Whether this life got to the end of the training."""
        point = self.random.choice([*POINTS, "any time"]) if may_die else ""
        death, after = None, None
        if point in POINTS:
            death = Death(point, self.random.randint(1, 4 * POINTS[point]))
        elif point:
            after = self.random.uniform(0.0, self.seconds)
        code = ended(fork(run.folder, run.variant, death), kill_after=after)
        if code == -signal.SIGKILL:
            assert may_die, "it hung"
            self.killed[point] += 1
            return False
        assert code == 0, (run.folder / "log.txt").read_text()
        return True

    def summary(self, seconds: float) -> str:
        """What was done, in a line."""
        where = ", ".join(f"{name} {count}" for name, count in sorted(self.killed.items()))
        return (
            f"{self.killed.total()} kills ({where}) in {self.finished} runs that all got to their "
            f"end: {self.losses} losses equal to those of undisturbed runs bit for bit, "
            f"{self.verified} checkpoints verified after deaths, none half visible, none missing; "
            f"{seconds:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Imports what a first optimizer imports, so that no child has to.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        driver = Driver(Path(folder), options.seed)
        driver.run(options.kills)
        print(driver.summary(time.monotonic() - begin))


if __name__ == "__main__":
    main()
