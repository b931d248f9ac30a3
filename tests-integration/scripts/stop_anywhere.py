"""SIGTERM at a random moment to one or all processes of runs on two ranks; each is then resumed.

``stop_anywhere.py FOLDER RUNS [LAUNCHER…]`` prints a line for each run that went wrong and a
summary. It forks, so that a run does not wait for imports: it must not compute anything itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from drivetrain import Trainer, seed_everything
from drivetrain.callbacks import ModelCheckpoint
from training_parts import Recorder, Regression, loader

#: Moments of the signal are spread over this time, in seconds: for one run in three from its start,
#: for the others from when both ranks have begun to train.
SPAN = {"fork": 1.5, "script": 6.0}
TRAINING = 1.5
#: How long a run may take to begin, in seconds.
BEGINS = 60.0
#: Longer than this after the signal is a hang, in seconds.
PATIENCE = 40.0
ENDLESS = 1_000_000


@dataclass
class Tally:
    """What happened in all runs."""

    runs: int = 0
    started: int = 0
    saved: int = 0
    slowest: float = 0.0
    hangs: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def fit(folder: Path, launcher: str, resume: str | None = None, steps: int = -1) -> None:
    """Train on two ranks, endlessly or for some steps, saving every few steps."""
    seed_everything(7)
    saving = ModelCheckpoint(dirpath=folder / "saved", every_n_train_steps=5)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        launcher=launcher,
        max_epochs=ENDLESS,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Recorder(str(folder)), saving],
    )
    model = Regression("sgd", total_steps=ENDLESS)
    trainer.fit(model, loader(), loader(16, shuffle=False), ckpt_path=resume)


def begin(folder: Path, launcher: str) -> int:
    """Start a run in a session of its own; returns its process id."""
    if launcher == "script":
        command = [sys.executable, __file__, "fit", str(folder)]
        with (folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True
            ).pid
    return forked(folder, "output.txt", folder, launcher)


def forked(folder: Path, output: str, *arguments: Any) -> int:
    """Run ``fit`` in a fork that leads a session."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(folder / output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        fit(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - the interpreter would print it and end with 1, as here
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def session(leader: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return sorted(found)


def ended(pid: int, within: float) -> int | None:
    """The exit code of a child (negative: a signal), or None if it runs on."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def sweep(pid: int) -> None:
    for each in session(pid):
        os.kill(each, signal.SIGKILL)


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"events-{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last is being written
    return [json.loads(line) for line in lines]


def has_begun(folder: Path) -> bool:
    """Whether both ranks train."""
    return all(events(folder, rank) for rank in (0, 1))


def one_run(folder: Path, launcher: str, draw: random.Random, tally: Tally) -> None:
    """Start, stop somewhere, and resume; what is wrong goes into the tally."""
    number, to_all, early = tally.runs, draw.random() < 0.5, draw.random() < 1 / 3
    moment = draw.uniform(0, SPAN[launcher] if early else TRAINING)
    tally.runs += 1
    when = f"{moment:.2f} s after {'its start' if early else 'training began'}"
    what = f"run {number} ({launcher}, {'all' if to_all else 'one'} {when})"
    pid = begin(folder, launcher)
    deadline = time.monotonic() + BEGINS
    while not early and not has_begun(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    code = ended(pid, moment)
    if code is not None:
        tally.wrong.append(f"{what}: ended with {code} before it was told to")
        return
    there = session(pid) or [pid]
    for each in there if to_all else [draw.choice(there)]:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGTERM)
    since = time.monotonic()
    code = ended(pid, PATIENCE)
    if code is None:
        tally.hangs.append(number)
        tally.wrong.append(f"{what}: hangs; see {folder / 'output.txt'}")
        sweep(pid)
        os.waitpid(pid, 0)
        return
    deadline = time.monotonic() + 10
    while session(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    tally.slowest = max(tally.slowest, time.monotonic() - since)
    if session(pid):
        tally.wrong.append(f"{what}: processes are left")
        sweep(pid)
    begun = has_begun(folder)
    tally.started += begun
    if code not in ({143} if begun else {143, -signal.SIGTERM}):
        tally.wrong.append(f"{what}: exit code {code}")
    if begun and any(events(folder, n)[-1]["event"] != "teardown" for n in (0, 1)):
        tally.wrong.append(f"{what}: a rank was not torn down")
    goes_on(folder, what, tally)


def goes_on(folder: Path, what: str, tally: Tally) -> None:
    """Resume from the checkpoint, if there is one, for three steps more."""
    saved = sorted((folder / "saved").glob("*.ckpt")) if (folder / "saved").exists() else []
    seen = [row["step"] for row in events(folder, 0) if row["event"] == "batch"]
    if not saved:
        if seen:
            tally.wrong.append(f"{what}: {len(seen)} steps, and no checkpoint")
        return
    tally.saved += 1
    step = max(int(path.stem.rpartition("step=")[2]) for path in saved)
    newest = next(path for path in saved if path.stem.endswith(f"step={step}"))
    pid = forked(folder, "resumed.txt", folder, "fork", str(newest), step + 3)
    code = ended(pid, 2 * PATIENCE)
    if code is None:
        sweep(pid)
        os.waitpid(pid, 0)
    steps = [row["step"] for row in events(folder, 0) if row["event"] == "batch"][len(seen) :]
    if code != 0 or steps != [step + 1, step + 2, step + 3]:
        tally.wrong.append(f"{what}: resumed from step {step} it ended with {code}: {steps}")


def summary(tally: Tally, seconds: float) -> str:
    """One line."""
    return (
        f"{tally.runs} runs, {tally.started} had begun to train, {tally.saved} resumed from a "
        f"checkpoint, {len(tally.hangs)} hangs, {len(tally.wrong)} wrong; the slowest end took "
        f"{tally.slowest:.1f} s; {seconds:.0f} s in all"
    )


def main() -> None:
    if sys.argv[1] == "fit":
        fit(Path(sys.argv[2]), "script")
        return
    folder, runs, launchers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or ["fork"]
    torch.set_num_threads(1)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # imports what ranks need
    tally, draw, began = Tally(), random.Random(11), time.monotonic()
    for number in range(runs):
        place = folder / f"run-{number}"
        place.mkdir(parents=True)
        one_run(place, launchers[number % len(launchers)], draw, tally)
        if tally.runs % 20 == 0:
            print(summary(tally, time.monotonic() - began), file=sys.stderr, flush=True)
    print("\n".join(tally.wrong))
    print(summary(tally, time.monotonic() - began))
    raise SystemExit(bool(tally.wrong))


if __name__ == "__main__":
    main()
