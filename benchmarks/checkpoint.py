"""What saving and loading a large state costs, beside what others do with the same state.

Everything is durable before the clock stops: files of others, which do not say fsync, are synced
after their save and within its time. Rounds take turns; the median of each is shown. Loads and
verification are of files in the page cache, so that memory and code are measured, not the disk.

    python benchmarks/checkpoint.py --megabytes 1024 --rounds 3 --folder /a/real/disk
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import xxhash
from drivetrain_interfaces.checkpoint import SaveGroup, Shard
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

warnings.filterwarnings("ignore")
TENSORS = 64
io = DirectoryCheckpointIO()


def state(megabytes, first=0, last=TENSORS):
    rows = megabytes * (1 << 20) // TENSORS // 4096
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{n}": torch.randn(rows, 1024, generator=generator) for n in range(first, last)}


def synced(path):
    """Others leave it to the system when their files reach the disk."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    for each in files:
        with each.open("rb") as file:
            os.fsync(file.fileno())


def torch_save(tree, path):
    torch.save(tree, path)
    synced(path)


def lightning_save(tree, path):
    from lightning.fabric.plugins.io import TorchCheckpointIO

    TorchCheckpointIO().save_checkpoint(tree, path)
    synced(path)


def accelerate_save(tree, path):
    from accelerate.utils import save

    save(tree, path, safe_serialization=True)
    synced(path)


def dcp_save(tree, path):
    import torch.distributed.checkpoint as dcp

    dcp.save(tree, checkpoint_id=str(path), no_dist=True)
    synced(path)


def lightning_load(path, tree):
    from lightning.fabric.plugins.io import TorchCheckpointIO

    TorchCheckpointIO().load_checkpoint(path)


def accelerate_load(path, tree):
    from safetensors.torch import load_file

    load_file(path)


def dcp_load(path, tree):
    import torch.distributed.checkpoint as dcp

    target = {name: torch.empty_like(each) for name, each in tree.items()}
    dcp.load(target, checkpoint_id=str(path), no_dist=True)


SAVES = {
    "drivetrain": lambda tree, path: io.save(tree, str(path)),
    "torch.save, fsync": torch_save,
    "Lightning": lightning_save,
    "Accelerate": accelerate_save,
    "DCP": dcp_save,
}
LOADS = {
    "drivetrain": lambda path, tree: io.load(str(path)),
    "torch.save, fsync": lambda path, tree: torch.load(path, weights_only=True),
    "Lightning": lightning_load,
    "Accelerate": accelerate_load,
    "DCP": dcp_load,
}


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def hashed(tree):
    digest = xxhash.xxh3_128()
    for each in tree.values():
        digest.update(each.numpy())


def read(path):
    buffer = bytearray(1 << 22)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def warm(path):
    """Into the page cache with it, whoever wrote it in which way."""
    for each in [path] if path.is_file() else path.rglob("*"):
        if each.is_file():
            read(each)


def in_background(tree, path):
    """The time that the loop stands still, and the time until it is durable."""
    start = time.perf_counter()
    pending = io.begin_save(tree, str(path))
    stall = time.perf_counter() - start
    pending.wait()
    return stall, time.perf_counter() - start


def by_two(megabytes, folder):
    """Two processes, each with half of every tensor's rows."""
    go = folder / "go"
    children = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, "--rank", str(rank)),
                *("--megabytes", str(megabytes), "--folder", str(folder)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    start = time.perf_counter()
    go.touch()
    for child in children:
        assert child.stdout.readline() == "saved\n"
    seconds = time.perf_counter() - start
    for child in children:
        assert child.wait(60) == 0
    go.unlink()
    gone(folder / "two")
    return seconds


def one_of_two(rank, megabytes, folder):
    tree = state(megabytes)
    shards = {}
    for name, each in tree.items():
        half = len(each) // 2
        first = rank * half
        shards[name] = Shard(each[first : first + half].clone(), (first, 0), tuple(each.shape))
    del tree
    print("ready", flush=True)
    while not (folder / "go").exists():
        time.sleep(0.001)
    io.save_sharded(shards, str(folder / "two"), SaveGroup(rank, 2, "bench", 60))
    print("saved", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rank", type=int)
    options = parser.parse_args()
    if options.rank is not None:
        one_of_two(options.rank, options.megabytes, options.folder)
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        measure(options.megabytes, options.rounds, folder)
    finally:
        shutil.rmtree(folder)


def measure(megabytes, rounds, folder):
    torch.manual_seed(0)
    tree = state(megabytes)
    times = {}

    def note(name, seconds):
        times.setdefault(name, []).append(seconds)

    for name in list(SAVES):
        try:
            SAVES[name]({"w": torch.ones(2)}, folder / "try")
        except ImportError as error:
            print(f"{name} is not installed ({error})")
            del SAVES[name], LOADS[name]
        gone(folder / "try")
    for turn in range(rounds):
        note("host copy", timed(lambda: [each.clone() for each in tree.values()]))
        note("hash", timed(hashed, tree))
        # Whoever is first pays for room in the page cache.
        order = list(SAVES.items())
        for name, save in order[turn % len(order) :] + order[: turn % len(order)]:
            path = folder / "x"
            os.sync()
            note(f"save {name}", timed(save, tree, path))
            warm(path)
            note(f"load {name}", timed(LOADS[name], path, tree))
            if name == "drivetrain":
                note("read", timed(read, path / "tensors.safetensors"))
                note("verify", timed(io.verify, str(path)))
            gone(path)
        os.sync()
        stall, whole = in_background(tree, folder / "y")
        note("stall", stall)
        note("in background", whole)
        gone(folder / "y")
        os.sync()
        note("two ranks", by_two(megabytes, folder))
    median = {name: statistics.median(each) for name, each in times.items()}
    report(median, megabytes)


def report(median, megabytes):
    base = median["save torch.save, fsync"], median["load torch.save, fsync"]
    print(f"\n| {megabytes} MB | save s | × torch.save | load s | × torch.load |")
    print("|---|---:|---:|---:|---:|")
    for name in SAVES:
        save, load = median[f"save {name}"], median[f"load {name}"]
        print(f"| {name} | {save:.2f} | {base[0] / save:.2f} | {load:.2f} | {base[1] / load:.2f} |")
    two = median["two ranks"]
    print(f"| drivetrain, two ranks | {two:.2f} | {base[0] / two:.2f} | | |")
    copy, stall, whole = (median[name] for name in ("host copy", "stall", "in background"))
    print(f"\nhost copy {copy:.3f} s, stall {stall:.3f} s: {stall / copy:.2f}")
    print(f"until a save in the background is durable: {whole:.2f} s")
    hashing, reading, verify = (median[name] for name in ("hash", "read", "verify"))
    share = max(reading, hashing) / verify
    print(f"hash {hashing:.3f} s, read {reading:.3f} s, verify {verify:.3f} s: {share:.0%}")


if __name__ == "__main__":
    main()
