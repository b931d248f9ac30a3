"""Train, kill -9, look at what is on the disk, resume, until so many processes have been killed.

``python kills.py --kills 200``. A run is as many lives as it takes to train to the end; each life
is a child forked from this process, which has imported everything and computes nothing. With two
ranks it starts them, and one of the three processes is killed. That happens inside a step, or in
the middle of staging, writing, committing, linking or pruning a checkpoint (at the n-th time that
it gets there), or at any time. Large states go to the disk past the page cache. After each death
the directory must hold whole checkpoints only, among them what had been reported as saved. What
each life did must be a piece of what an undisturbed run does, bit for bit on every rank, and the
last must get to its end.
"""

from __future__ import annotations

import argparse
import ctypes
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from drivetrain import Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from drivetrain_toolkit import directfile
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
    "large": {
        "checkpoint": {"every_n_train_steps": 3, "save_top_k": 1, "save_last": True},
        "large": 1,
    },
    "two ranks": {
        "checkpoint": {"every_n_train_steps": 1, "save_top_k": 2, "save_last": True},
        "trainer": {"devices": 2, "strategy": "fsdp", "launcher": "fork"},
    },
    "two ranks, one writes": {
        "checkpoint": {"every_n_train_steps": 2, "save_top_k": 2, "asynchronous": True},
        "trainer": {"devices": 2, "strategy": "ddp", "launcher": "fork"},
    },
    "two ranks, large": {
        "checkpoint": {"every_n_train_steps": 3, "save_top_k": 1, "asynchronous": True},
        "trainer": {"devices": 2, "strategy": "zero1", "launcher": "fork"},
        "large": 2,
    },
}
#: About how often each point is passed for one checkpoint.
POINTS = {"step": 1, "stage": 1, "write": 3, "sync": 7, "commit": 2, "link": 1, "prune": 5}
#: Passed besides by large states: each buffer of the file.
LARGE_POINTS = {**POINTS, "piece": 8}
#: Of each file of a large state, in numbers of four bytes: it is written past the page cache.
LARGE = directfile.WORTH_IT // 4 + 1000
#: Of these, what a rank other than 0 passes: always, and where each rank writes its part.
STEPPING, WRITING = ("step", "stage"), ("write", "sync", "piece")
#: What a life notes when it stops, of itself or because it is told to.
ENDS = {"train_end", "fit_end"}
PATIENCE = 100.0
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


class Death:
    """Kills this process when a point is passed for the n-th time.

    Args:
        point: One of ``LARGE_POINTS``.
        count: How often it is passed.
        rank: The rank that dies, as ``RANK`` has it; empty in a run of one process.
        mark: A file that is made just before.
    """

    def __init__(self, point: str, count: int, rank: str, mark: Path) -> None:
        self.point = point
        self.left = count
        self.rank = rank
        self.mark = mark
        self.sync = os.fsync
        self.pwrite = os.pwrite

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        optimizers.register_optimizer_step_pre_hook(lambda *_: self.at("step"))
        os.fsync = self._fsync
        os.pwrite = self._pwrite

    def at(self, point: str) -> None:
        if point != self.point or self.rank != os.environ.get("RANK", ""):
            return
        self.left -= 1
        if self.left == 0:
            self.mark.touch()
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

    def _pwrite(self, handle: int, data: Any, offset: int) -> int:
        self.at("piece")
        return self.pwrite(handle, data, offset)


class Witness(Recorder):
    """Notes what happens, and which checkpoint was there when the run went on.

    Each batch changes what makes a state large.
    """

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

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        Path(self.folder, f"pid-{trainer.world.rank}").write_text(str(os.getpid()))

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        for buffer in module.buffers():
            buffer.add_(1)

    def on_save_opportunity(self, trainer: Any, module: Any, moment: Any) -> None:
        newest = self.saver.last_model_path
        if newest != self.known and trainer.world.is_main:
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
    for number in range(asked.get("large", 0)):
        model.register_buffer(f"large{number}", torch.arange(LARGE, dtype=torch.float32))
    if death is not None:
        death.arm()
    trainer.fit(model, loader(), loader(16, shuffle=False), ckpt_path="last")
    done = {
        "step": trainer.global_step,
        "parameters": parameters_of(model.net),
        "buffers": [xxhash.xxh3_64_hexdigest(buffer.numpy()) for buffer in model.buffers()],
    }
    Path(folder, "done.json").write_text(json.dumps(done), encoding="utf-8")


class Life:
    """A process that trains, and the ranks that it starts.

    Args:
        child: The process.
        folder: Where it trains; ranks leave their numbers there.
    """

    def __init__(self, child: int, folder: Path) -> None:
        self.child = child
        self.folder = folder
        self.killed = False

    def end(self, kill_after: float | None = None, victim: int = 0) -> int:
        """Its exit code, negative for a signal, once all that it started has ended too.

        One of its processes is killed after so many seconds.
        """
        begin = time.monotonic()
        code = 0
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if pid == self.child:
                code, kill_after = os.waitstatus_to_exitcode(status), None
            if pid:
                continue
            age = time.monotonic() - begin
            if age > PATIENCE:
                for number in range(len(self._pids())):
                    self._kill(number)
                raise AssertionError(f"it hung: {(self.folder / 'log.txt').read_text()}")
            if kill_after is not None and age > kill_after:
                self._kill(victim)
                kill_after = None
            time.sleep(0.002)

    def _pids(self) -> list[int]:
        noted = [each.read_text() for each in self.folder.glob("pid-*")]
        return [self.child, *(int(each) for each in noted if each)]

    def _kill(self, victim: int) -> None:
        pids = self._pids()
        with suppress(ProcessLookupError):
            os.kill(pids[victim % len(pids)], signal.SIGKILL)
            self.killed = True


def fork(folder: Path, variant: str, death: Death | None = None) -> Life:
    """Begin a life in a process and session of its own."""
    child = os.fork()
    if child:
        return Life(child, folder)
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
        self.ranks: int = VARIANTS[variant].get("trainer", {}).get("devices", 1)
        self.points = LARGE_POINTS if "large" in VARIANTS[variant] else POINTS
        self.verified = 0

    def points_of(self, rank: int) -> list[str]:
        """The points that a rank passes."""
        if rank == 0:
            return list(self.points)
        alone = VARIANTS[self.variant]["trainer"]["strategy"] == "ddp"
        return [*STEPPING, *(each for each in WRITING if each in self.points and not alone)]

    def lives(self, rank: int = 0) -> list[list[str]]:
        """The events of each life that got as far as training."""
        path = self.folder / f"events-{rank}.jsonl"
        found: list[list[str]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            event = json.loads(line)["event"]
            if event == "train_start":
                found.append([])
            elif event != "teardown":  # which a rank also does when the other has died
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
        losses = 0
        for rank in range(self.ranks):
            (whole,) = self.expected.lives(rank)
            for events in self.lives(rank):
                while events and json.loads(events[-1])["event"] in ENDS:
                    events.pop()  # a rank whose launcher was killed stops as for a signal
                begin = whole.index(events[0]) if events else 0
                assert events == whole[begin : begin + len(events)], "\n".join(events)
                losses += sum('"batch"' in event for event in events)
        return losses

    def check_end(self) -> None:
        """The last life got to the end, and to the same result."""
        assert self.expected is not None
        for rank in range(self.ranks):
            (whole,) = self.expected.lives(rank)
            last = self.lives(rank)[-1]
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
        self.seconds: dict[str, float] = {}
        self.by_variant: Counter[str] = Counter()

    def reference(self, variant: str) -> Run:
        """The undisturbed run of a variant."""
        if variant not in self.references:
            run = Run(self.folder / f"whole-{len(self.references)}", variant)
            begin = time.monotonic()
            code = fork(run.folder, variant).end()
            assert code == 0, (run.folder / "log.txt").read_text()
            self.seconds[variant] = time.monotonic() - begin
            self.references[variant] = run
        return self.references[variant]

    def run(self, kills: int, variants: list[str]) -> None:
        """Run after run, until so many lives were killed; the last run gets to its end."""
        number = 0
        while self.killed.total() < kills:
            variant = variants[number % len(variants)]
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
        rank = self.random.randrange(run.ranks)
        points = [*run.points_of(rank), "any time"]
        point = self.random.choice(points) if may_die else ""
        mark = run.folder / "dead"
        death, after, victim = None, None, 0
        if point in run.points:
            count = self.random.randint(1, 4 * run.points[point])
            death = Death(point, count, "" if run.ranks == 1 else str(rank), mark)
        elif point:
            after = self.random.uniform(0.0, self.seconds[run.variant])
            victim = self.random.randrange(6)
        for left in (mark, *run.folder.glob("pid-*")):
            left.unlink(missing_ok=True)
        life = fork(run.folder, run.variant, death)
        code = life.end(after, victim)
        if code and (life.killed or mark.exists()):
            self.killed[point] += 1
            self.by_variant[run.variant] += 1
            return False
        assert code == 0, (run.folder / "log.txt").read_text()
        assert not mark.exists(), "a rank died, and the others did not notice"
        return True

    def summary(self, seconds: float) -> str:
        """What was done, in a line."""
        where = ", ".join(f"{name} {count}" for name, count in sorted(self.killed.items()))
        ranks = sum(n for name, n in self.by_variant.items() if "ranks" in name)
        large = sum(n for name, n in self.by_variant.items() if "large" in name)
        return (
            f"{self.killed.total()} kills ({where}; {ranks} with two ranks, {large} with a large "
            f"state) in {self.finished} runs that all got to their "
            f"end: {self.losses} losses equal to those of undisturbed runs bit for bit, "
            f"{self.verified} checkpoints verified after deaths, none half visible, none missing; "
            f"{seconds:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    options = parser.parse_args()
    if sys.platform == "linux":  # ranks whose launcher was killed are waited for here
        ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0)
    torch.set_num_threads(1)
    # Imports what a first optimizer imports, so that no child has to.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        driver = Driver(Path(folder), options.seed)
        driver.run(options.kills, options.variant or list(VARIANTS))
        print(driver.summary(time.monotonic() - begin))


if __name__ == "__main__":
    main()
