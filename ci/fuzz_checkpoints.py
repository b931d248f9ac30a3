"""Coverage-guided fuzzing of everything that reads checkpoints: ``nox -s fuzz -- SECONDS``.

Each input is one of: a manifest, a state, a file of tensors (put into a checkpoint whose hashes are
made right, so that the readers get past them), a single file, and a pickle program in an archive.
What is found must be a ``DrivetrainError``. An audit hook watches for code and for files; the
largest allocation is that of the fuzzer's limit of memory.
"""

from __future__ import annotations

import atexit
import codecs
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["drivetrain_toolkit"]):
    from drivetrain_toolkit import durable
    from drivetrain_toolkit.checkpoint import MANIFEST, STATE, TENSORS, DirectoryCheckpointIO

import torch
import xxhash
from drivetrain_interfaces.errors import DrivetrainError

FORBIDDEN = (
    "exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "os.fork",
    "subprocess.",
)  # fmt: skip
MEMORY = "/dev/shm"  # a disk would be most of the time
HOME = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY if os.path.isdir(MEMORY) else None))
GOOD = HOME / "good"
CHECKPOINT = HOME / "x"
SINGLE = HOME / "single"
IO = DirectoryCheckpointIO()
KINDS = 5
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event.startswith(FORBIDDEN):
        os.write(2, f"{event} {arguments}\n".encode())
        os.abort()
    writes = os.O_WRONLY | os.O_RDWR
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
        os.write(2, f"{event} {arguments}\n".encode())
        os.abort()


def signed(body: dict[str, Any]) -> bytes:
    """A manifest with the right hash."""
    text = bytearray(json.dumps({**body, "xxh3_128": "0" * 32}, indent=1).encode() + b"\n")
    text[-36:-4] = xxhash.xxh3_128_hexdigest(text).encode()
    return bytes(text)


def write(kind: int, data: bytes) -> Path:
    """Put the data where a reader finds it."""
    if kind == 0:
        text = bytearray(data)
        text[-36:-4] = b"0" * 32
        text[-36:-4] = xxhash.xxh3_128_hexdigest(text).encode()
        (CHECKPOINT / MANIFEST).write_bytes(text)
        return CHECKPOINT
    if kind in {1, 2}:
        name = STATE if kind == 1 else TENSORS
        (CHECKPOINT / name).write_bytes(data)
        body = json.loads((GOOD / MANIFEST).read_text())
        digest = durable.hash_file(str(CHECKPOINT / name))
        body["files"][name] = {"size": len(data), "xxh3_128": digest}
        (CHECKPOINT / MANIFEST).write_bytes(signed(body))
        return CHECKPOINT
    if kind == 3:  # noqa: PLR2004
        SINGLE.write_bytes(data)
        return SINGLE
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", b"\x00" * 64)
    SINGLE.write_bytes(buffer.getvalue())
    return SINGLE


def restore() -> None:
    """The good checkpoint again."""
    for name in (MANIFEST, STATE, TENSORS):
        shutil.copyfile(GOOD / name, CHECKPOINT / name)


def read(path: Path) -> None:
    """With every reader; errors have names."""
    readers = [IO.inspect, IO.load, IO.verify] if path is CHECKPOINT else [IO.read_file, IO.inspect]
    for reader in readers:
        with suppress(DrivetrainError):
            reader(str(path))


def one(data: bytes) -> None:
    """One input: its first byte says what it is."""
    global _watching  # noqa: PLW0603
    if not data:
        return
    path = write(data[0] % KINDS, data[1:])
    _watching = True
    try:
        read(path)
    finally:
        _watching = False
        restore()


def seeds(folder: Path) -> None:
    """Honest files to begin with."""
    weights = {"w": torch.ones(2, 2), "h": torch.ones(3).half()}
    IO.save({"module": weights, "n": (1, 2.5)}, str(GOOD))
    shutil.copytree(GOOD, CHECKPOINT)
    torch.save({"w": torch.ones(4, 4), "l": [1, "x", None, 2.5]}, SINGLE)
    with zipfile.ZipFile(SINGLE) as archive:
        program = archive.read("single/data.pkl")
    folder.mkdir()
    honest = (
        (GOOD / MANIFEST).read_bytes(),
        (GOOD / STATE).read_bytes(),
        (GOOD / TENSORS).read_bytes(),
        SINGLE.read_bytes(),
        program,
    )
    for kind, data in enumerate(honest):
        (folder / str(kind)).write_bytes(bytes([kind]) + data)
    for kind in range(KINDS):  # whatever is imported late is imported now
        read(write(kind, honest[kind]))
        restore()
    codecs.lookup("cp437")  # what zipfile decodes some names with
    codecs.lookup("raw-unicode-escape")  # and pickletools some texts


def main() -> None:
    """Fuzz for as many seconds as are asked for."""
    seconds = sys.argv[1] if len(sys.argv) > 1 else "60"
    corpus = HOME / "corpus"
    atexit.register(shutil.rmtree, HOME)
    seeds(corpus)
    sys.addaudithook(_watch)
    limits = ("rss_limit_mb=2048", "malloc_limit_mb=256", "max_len=4096", "timeout=10")
    options = [f"-max_total_time={seconds}", *(f"-{limit}" for limit in limits)]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
