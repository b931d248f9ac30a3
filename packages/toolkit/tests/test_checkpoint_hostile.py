"""Hostile files: no code runs, nothing outside is touched, and each is refused by name.

K6, K8 and K20 of docs/contracts/checkpoint.md.
"""

from __future__ import annotations

import io as memory
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit import durable
from drivetrain_toolkit.checkpoint import MANIFEST, STATE, TENSORS, DirectoryCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Callable

from drivetrain_toolkit.jsontext import ROOM

READER = Path(__file__).with_name("hostile_reader.py")
SUFFIXES = (
    "pkl",
    "pt",
    "pth",
    "ckpt",
    "bin",
    "safetensors",
    "json",
    "npz",
    "npy",
    "zip",
    "h5",
    "yaml",
)
NAMES = (
    "../state.json",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "..\\b",
    "C:\\x",
    "a\x00b",
    ".hidden",
    "~root",
    "a" * 300,
    "\u202egnp.json",
    "\uff0e\uff0e/x",
    "e\u0301.json",
    "state.json\n",
    "CON\u200b",
    "\ud800",
)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def signed(body: dict[str, Any], raw: Callable[[str], str] = str) -> bytes:
    """A manifest with the right hash, whatever it says."""
    text = bytearray(raw(json.dumps({**body, "xxh3_128": "0" * 32}, indent=1)).encode() + b"\n")
    text[-36:-4] = xxhash.xxh3_128_hexdigest(text).encode()
    return bytes(text)


class Corpus:
    """A folder of hostile files."""

    def __init__(self, folder: Path, marker: str) -> None:
        self.folder = folder
        self.marker = marker
        folder.mkdir()
        self.good = folder.parent / "good"
        DirectoryCheckpointIO().save(
            {"module": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, "n": 1},
            str(self.good),
        )

    def copy(self, name: str) -> Path:
        path = self.folder / name
        shutil.copytree(self.good, path)
        return path

    def file(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def resigned(
        self, name: str, change: Callable[[dict[str, Any]], object], **files: bytes
    ) -> None:
        """A copy with other files and another manifest, consistent in itself."""
        path = self.copy(name)
        body = json.loads((path / MANIFEST).read_text())
        for file, data in files.items():
            target = {"state": STATE, "tensors": TENSORS}[file]
            (path / target).write_bytes(data)
            body["files"][target] = {
                "size": len(data),
                "xxh3_128": durable.hash_file(str(path / target)),
            }
        change(body)
        (path / MANIFEST).write_bytes(signed(body))

    def fill(self) -> None:
        for step in (
            self.pickles,
            self.names,
            self.numbers,
            self.headers,
            self.layouts,
            self.texts,
            self.codecs,
            self.links,
            self.archives,
            self.programs,
            self.expanding,
        ):
            step()

    def pickles(self) -> None:
        bomb = Bomb(self.marker)
        buffer = memory.BytesIO()
        torch.save({"state_dict": bomb, "x": [bomb]}, buffer)
        for suffix in SUFFIXES:
            self.file(f"bare.{suffix}", pickle.dumps(bomb))
            self.file(f"old.{suffix}", pickle.dumps(bomb, protocol=0))
            self.file(f"torch.{suffix}", buffer.getvalue())
        for name in (MANIFEST, STATE, TENSORS):
            (self.copy(f"pickled-{name}") / name).write_bytes(pickle.dumps(bomb))
        self.resigned("pickled-signed-state", lambda body: None, state=pickle.dumps(bomb))
        self.resigned("pickled-signed-tensors", lambda body: None, tensors=pickle.dumps(bomb))

    def names(self) -> None:
        for number, name in enumerate(NAMES):

            def rename(body: dict[str, Any], name: str = name) -> None:
                body["files"][name] = body["files"].pop(STATE)
                body["state"] = name

            self.resigned(f"name-state-{number}", rename)

            def other(body: dict[str, Any], name: str = name) -> None:
                body["files"][name] = body["files"][TENSORS]
                body["tensors"]["module/w"]["shards"][0]["file"] = name

            self.resigned(f"name-shard-{number}", other)
        self.resigned(
            "name-twice", lambda body: body["files"].update({STATE.upper(): body["files"][STATE]})
        )
        self.resigned(
            "name-manifest", lambda body: body["files"].update({MANIFEST: body["files"][STATE]})
        )

    def numbers(self) -> None:
        wrong = (
            -1,
            2**40,
            2**63,
            2**70,
            1.0,
            1e30,
            True,
            None,
            "1",
            [],
            float("nan"),
            float("inf"),
        )
        for number, value in enumerate(wrong):
            entry: list[Callable[[dict[str, Any]], Any]] = [
                lambda body, value=value: body["files"][TENSORS].update(size=value),
                lambda body, value=value: body["tensors"]["module/w"].update(shape=[2, value]),
                lambda body, value=value: body["tensors"]["module/w"]["shards"][0].update(
                    start=[0, value]
                ),
                lambda body, value=value: body["tensors"]["module/w"]["shards"][0].update(
                    shape=[2, value]
                ),
                lambda body, value=value: body["tensors"]["module/w"].update(
                    shape=[2, value],
                    shards=[{**body["tensors"]["module/w"]["shards"][0], "shape": [2, value]}],
                ),
                lambda body, value=value: body.update(version=[value]),
            ]
            for which, change in enumerate(entry):
                self.resigned(f"number-{number}-{which}", change)
        self.resigned(
            "number-dimensions",
            lambda body: body["tensors"]["module/w"].update(
                shape=[1] * 70,
                shards=[{"file": TENSORS, "key": "module/w", "start": [0] * 70, "shape": [1] * 70}],
            ),
        )

    def headers(self) -> None:
        data = (self.good / TENSORS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        body = data[8 + length :]

        def made(text: str, claimed: int | None = None) -> bytes:
            raw = text.encode("utf-8", "surrogatepass")
            return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + body

        def changed(**values: Any) -> str:
            return json.dumps({**header, "module/w": {**header["module/w"], **values}})

        texts = {
            "terabyte": made(json.dumps(header), 10**12),
            "largest": made(json.dumps(header), 2**64 - 1),
            "hundred-megabytes": made(json.dumps(header), 99_999_999),
            "short": data[:4],
            "empty": b"",
            "negative": made(changed(data_offsets=[-24, 0])),
            "backwards": made(changed(data_offsets=[24, 0])),
            "overlapping": made(changed(data_offsets=[4, 28])),
            "beyond": made(changed(data_offsets=[10**12, 10**12 + 24])),
            "huge": made(changed(shape=[2**40, 2**40], data_offsets=[0, 2**82])),
            "wrapped": made(changed(shape=[2**32, 2**32], data_offsets=[0, 24])),
            "float": made(changed(data_offsets=[0.0, 24.0])),
            "nan": made(changed(data_offsets=[float("nan"), 24])),
            "dtype": made(changed(dtype="object")),
            "dtype-list": made(changed(dtype=["F32"])),
            "shape-text": made(changed(shape="23")),
            "list": made("[]"),
            "twice": made(
                json.dumps(header)[:-1] + ',"module/b":' + json.dumps(header["module/b"]) + "}"
            ),
            "deep": made("[" * 100_000),
            "digits": made(changed(shape=[1]).replace("1]", "1" * 5000 + "]")),
            "latin": made("\udcff{}"),
            "more": made(
                json.dumps(
                    {**header, "x": {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]}}
                )
            ),
            "less": made("{}"),
        }
        for name, raw in texts.items():
            self.resigned(f"header-{name}", lambda body: None, tensors=raw)
            self.file(f"alone-header-{name}.safetensors", raw)

    def layouts(self) -> None:
        def shards(*boxes: tuple[list[int], list[int]]) -> Callable[[dict[str, Any]], None]:
            def change(body: dict[str, Any]) -> None:
                body["tensors"]["module/w"]["shards"] = [
                    {"file": TENSORS, "key": f"k{n}" if n else "module/w", "start": s, "shape": e}
                    for n, (s, e) in enumerate(boxes)
                ]

            return change

        self.resigned("layout-gap", shards(([0, 0], [1, 3])))
        self.resigned("layout-overlap", shards(([0, 0], [2, 3]), ([1, 0], [1, 3])))
        self.resigned("layout-twice", shards(([0, 0], [2, 3]), ([0, 0], [2, 3])))
        self.resigned("layout-outside", shards(([1, 1], [2, 3])))
        self.resigned("layout-none", shards())
        self.resigned("layout-many", shards(*[([0, 0], [2, 3])] * 20_000))
        self.resigned(
            "layout-same-bytes",
            lambda body: body["tensors"].update({"copy": body["tensors"]["module/w"]}),
        )
        # One file, named by thousands of tensors
        self.resigned(
            "layout-amplified",
            lambda body: body["tensors"].update(
                {
                    f"t{n}": {
                        "dtype": "float32",
                        "shape": [2, 3],
                        "shards": [
                            {"file": TENSORS, "key": f"t{n}", "start": [0, 0], "shape": [2, 3]}
                        ],
                    }
                    for n in range(5000)
                }
            ),
        )
        self.resigned(
            "layout-state-as-tensors",
            lambda body: body["tensors"]["module/w"]["shards"][0].update(file=STATE),
        )
        self.resigned("layout-state-is-tensors", lambda body: body.update(state=TENSORS))

    def texts(self) -> None:
        good = (self.good / MANIFEST).read_bytes()
        state = (self.good / STATE).read_bytes()
        texts = {
            "empty": b"",
            "nothing": b"\n",
            "list": b"[]",
            "number": b"1",
            "nul": b"\x00" * 100,
            "bom": b"\xef\xbb\xbf" + state,
            "utf16": state.decode().encode("utf-16"),
            "latin": b'{"a": "\xff"}',
            "trailing": state + b"{}",
            "nan": b'{"a": NaN}',
            "infinity": b'{"a": -Infinity}',
            "deep": b"[" * 200_000,
            "deep-closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            "digits": b'{"a": ' + b"9" * 100_000 + b"}",
            "twice": b'{"a": 1, "a": 2}',
            "gzip": b"\x1f\x8b" + b"\x00" * 50,
        }
        for name, raw in texts.items():
            self.resigned(f"text-state-{name}", lambda body: None, state=raw)
            (self.copy(f"text-manifest-{name}") / MANIFEST).write_bytes(raw)
        body = json.loads(good)
        for key in body.keys() - {"xxh3_128"}:
            self.resigned(f"lacks-{key}", lambda body, key=key: body.pop(key))
            self.resigned(f"null-{key}", lambda body, key=key: body.update({key: {"": None}}))

    def codecs(self) -> None:
        values: dict[str, Any] = {
            "system": {"$": "os.system", "value": f"touch {self.marker}"},
            "eval": {"$": "builtins.eval", "value": "1"},
            "list": {"$": ["tuple"], "value": []},
            "none": {"$": None, "value": []},
            "no-value": {"$": "tuple"},
            "tensor": {"$": "tensor", "name": "other"},
            "tensor-list": {"$": "tensor", "name": ["module/w"]},
            "dtype": {"$": "torch.dtype", "value": "_dynamo"},
            "dtype-module": {"$": "torch.dtype", "value": "classes"},
            "device": {"$": "torch.device", "value": "no such device"},
            "size": {"$": "torch.Size", "value": ["a"]},
            "deque": {"$": "deque", "value": [[1], -1]},
            "bytes": {"$": "bytes", "value": "\u00e9"},
            "float": {"$": "float", "value": "00"},
            "dict": {"$": "dict", "value": 5},
            "unhashable": {"$": "dict", "value": [[[], 1]]},
            "array-huge": {
                "$": "numpy.ndarray",
                "value": {"dtype": "<f8", "shape": [2**40], "data": ""},
            },
            "array-long": {
                "$": "numpy.ndarray",
                "value": {"dtype": "<U999999999", "shape": [1], "data": ""},
            },
            "array-object": {
                "$": "numpy.ndarray",
                "value": {"dtype": "|O", "shape": [1], "data": "AAAAAAAAAAA="},
            },
            "array-negative": {
                "$": "numpy.ndarray",
                "value": {"dtype": "<f8", "shape": [-5], "data": ""},
            },
            "delta": {"$": "timedelta", "value": [10**30]},
            "complex": {"$": "complex", "value": [[], 1]},
            "nested": None,
        }
        deep: Any = 1
        for _ in range(400):
            deep = {"$": "tuple", "value": [deep]}
        values["nested"] = {"$": "torch.Size", "value": [deep]}
        for name, value in values.items():
            text = json.dumps({"module": {}, "x": value}).encode()
            self.resigned(f"codec-{name}", lambda body: None, state=text)

    def links(self) -> None:
        secret = self.folder.parent / "secret"
        shutil.copytree(self.good, secret)
        for name in (MANIFEST, STATE, TENSORS):
            path = self.copy(f"link-{name}") / name
            path.unlink()
            path.symlink_to(secret / name)
            fifo = self.copy(f"pipe-{name}") / name
            fifo.unlink()
            os.mkfifo(fifo)
            folder = self.copy(f"folder-{name}") / name
            folder.unlink()
            folder.mkdir()
        (self.copy("link-extra") / "extra").symlink_to("/etc/passwd")
        (self.copy("link-zero") / "extra").symlink_to("/dev/zero")
        (self.folder / "link-to-etc").symlink_to("/etc")
        (self.folder / "link-to-itself").symlink_to("link-to-itself")
        (self.folder / "link-to-nothing").symlink_to("nothing")
        os.mkfifo(self.folder / "pipe")

    def archives(self) -> None:
        buffer = memory.BytesIO()
        torch.save({"w": torch.zeros(1000)}, buffer)
        with zipfile.ZipFile(buffer) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        self.file("zip-good-cut.pt", buffer.getvalue()[:-10])
        self.file("zip-only-start.pt", b"PK\x03\x04")
        packed = memory.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
            archive.writestr("archive/data/bomb", b"\x00" * 50_000_000)
        self.file("zip-bomb.pt", packed.getvalue())
        traversal = memory.BytesIO()
        with zipfile.ZipFile(traversal, "w") as archive:
            for name, data in records.items():
                archive.writestr(name.replace("/data/0", "/../../../x"), data)
        self.file("zip-traversal.pt", traversal.getvalue())
        # Many records that are the same bytes: the central directory entry, repeated.
        raw = bytearray(buffer.getvalue())
        end = raw.rindex(b"PK\x05\x06")
        first = raw.index(b"PK\x01\x02")
        entry = bytes(raw[first:end])
        count = len(records)
        directory = entry * 200
        ending = struct.pack(
            "<4s4H2LH", b"PK\x05\x06", 0, 0, count * 200, count * 200, len(directory), first, 0
        )
        self.file("zip-overlapping.pt", bytes(raw[:first]) + directory + ending)

    def programs(self) -> None:
        """Pickle programs in an archive with one storage of four floats."""
        tensor = (
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%btQ%b%b%b\x89ccollections\nOrderedDict\n)RtR"
        )

        def rebuilt(count: bytes, offset: bytes, size: bytes, stride: bytes) -> bytes:
            return b"}X\x01\x00\x00\x00w" + tensor % (count, offset, size, stride) + b"s."

        laughs = b"]q\x00"
        for n in range(60):
            laughs += b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1)
        laughs += b"}X\x01\x00\x00\x00ah<s."
        one, four = b"K\x01\x85", b"K\x04\x85"
        programs = {
            "eval": b"}X\x01\x00\x00\x00acbuiltins\neval\n(X\x01\x00\x00\x001tRs.",
            "system-top": b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
            "bytearray": b"}Ncbuiltins\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x10tRs.",
            "instance": b"(ios\nsystem\n.",
            "object": b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",
            "extension": b"\x82\x01.",
            "endless": b"}" * 1000,
            "nothing": b"",
            "stop": b".",
            "memo": b"}r\xff\xff\xff\x7fj\xff\xff\xff\x7f.",
            "memo-missing": b"h\x05.",
            "mark": b"(.",
            "no-mark": b"]e.",
            "laughs": laughs,
            "itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
            "deep": b"}X\x01\x00\x00\x00a" + b"]" * 50_000 + b"a" * 49_999 + b"s.",
            "deep-key": b"})" + b"\x85" * 100_000 + b"Ns.",
            "append-int": b"K\x01K\x02a.",
            "set-list": b"]K\x01K\x02s.",
            "build-dict": b"}}b.",
            "reduce-int": b"}K\x01)R.",
            "persistent": b"}X\x01\x00\x00\x00aK\x01Qs.",
            "long-text": b"X\xff\xff\xff\x7fabc.",
            "long-bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
            "storage-too-long": rebuilt(b"\xff", b"K\x00", four, one),
            "tensor-too-long": rebuilt(b"\x04", b"K\x00", b"K\xff\x85", one),
            "tensor-offset": rebuilt(b"\x04", b"K\x01", four, one),
            "tensor-negative": rebuilt(b"\x04", b"J\xff\xff\xff\xff", four, one),
            "tensor-negative-stride": rebuilt(b"\x04", b"K\x03", four, b"J\xff\xff\xff\xff\x85"),
            "tensor-terabyte": rebuilt(
                b"\x04", b"K\x00", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", b"K\x00\x85"
            ),
            "tensor-dimensions": rebuilt(b"\x04", b"K\x00", b"K\x01K\x01\x86", one),
        }
        for name, program in programs.items():
            buffer = memory.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("archive/data.pkl", b"\x80\x02" + program)
                archive.writestr("archive/data/0", b"\x00" * 16)
            self.file(f"program-{name}.pt", buffer.getvalue())

    def expanding(self) -> None:
        """Ten megabytes each, which as objects of Python would be up to thirty times that."""
        size = 10_000_000

        def many(item: bytes, start: bytes = b"[", end: bytes = b"]") -> bytes:
            return start + (item + b",") * (size // (len(item) + 1)) + item + end

        def numbered(item: bytes) -> bytes:
            return b"{" + b",".join(item % n for n in range(size // (len(item) + 5))) + b"}"

        texts = {
            "lists": many(b"[]"),
            "objects": many(b"{}"),
            "numbers": many(b"999"),
            "deques": many(b'{"$":"deque","value":[[],1]}'),
            "set": many(b"1", b'{"$":"set","value":[', b"]}"),
            "names": numbered(b'"%d":1'),
            "deep-places": b'{"'
            + b"k" * (size - 5000)
            + b'":'
            + many(b"1")[-5000:].join((b"[", b"}")),
            "wide": b'["' + b"a" * size + "\U0001f600".encode() + b'"]',
        }
        body = json.loads((self.good / MANIFEST).read_text())
        for name, text in texts.items():
            self.resigned(f"expand-state-{name}", lambda body: None, state=text)
            inside = json.dumps({**body, "more": "@", "xxh3_128": "0" * 32}, indent=1).encode()
            raw = bytearray(inside.replace(b'"@"', text) + b"\n")
            raw[-36:-4] = xxhash.xxh3_128_hexdigest(raw).encode()
            (self.copy(f"expand-manifest-{name}") / MANIFEST).write_bytes(raw)
            header = struct.pack("<Q", len(text)) + text
            self.file(f"expand-header-{name}.safetensors", header)
        programs = {
            "lists": b"](" + b"]" * size + b"e.",
            "objects": b"](" + b"}" * size + b"e.",
            "numbers": b"](" + b"K\x01" * (size // 2) + b"e.",
            "notes": b"]" + b"\x94" * size + b".",
            "tuples": b"](N" + b"\x85" * size + b"e.",
        }
        for name, program in programs.items():
            buffer = memory.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("archive/data.pkl", b"\x80\x04" + program)
            self.file(f"expand-program-{name}.pt", buffer.getvalue())
        entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *(0,) * 16)
        count = size // len(entry)
        directory = entry * count
        sizes = (min(count, 0xFFFF),) * 2
        ending = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *sizes, len(directory), 4, 0)
        self.file("expand-directory.pt", b"PK\x03\x04" + directory + ending)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything is read once, by a process that watches itself."""
    home = tmp_path_factory.mktemp("hostile")
    corpus = Corpus(home / "corpus", str(home / "ran"))
    corpus.fill()
    (home / "output").mkdir()
    before = sorted(path.name for path in home.iterdir())
    done = subprocess.run(
        [sys.executable, str(READER), str(corpus.folder), str(home / "output")],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    found["ran"] = (home / "ran").exists()
    found["changed"] = sorted(path.name for path in home.iterdir()) != before
    found["sizes"] = {
        path.name: sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
        for path in corpus.folder.glob("expand-*")
    }
    found["largest"] = max(
        path.stat().st_size
        for path in corpus.folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    return found


def test_no_code_runs_and_nothing_outside_is_touched(report: dict[str, Any]) -> None:
    assert report["seen"] == []
    assert not report["ran"]
    assert not report["changed"]


def test_memory_stays_within_twice_the_largest_file(report: dict[str, Any]) -> None:
    assert report["grown"] < 2 * report["largest"] + ROOM + (32 << 20)  # what malloc keeps


def test_what_would_expand_takes_twice_its_size_and_little_more(report: dict[str, Any]) -> None:
    """Whatever is in a file: what Python would make of ten megabytes can be three hundred."""
    assert len(report["peaks"]) >= 25
    over = {
        name: peak
        for name, peak in report["peaks"].items()
        if peak > 2 * report["sizes"][name] + ROOM
    }
    assert over == {}


def test_every_file_is_refused_by_a_named_error(report: dict[str, Any]) -> None:
    assert len(report["outcomes"]) > 250
    unnamed = {
        name: said
        for name, outcomes in report["outcomes"].items()
        if any("UNNAMED" in (said := each) for each in outcomes.values())
    }
    assert unnamed == {}
    accepted = [
        name for name, said in report["outcomes"].items() if not said["load"].startswith("[DT40")
    ]
    assert accepted == []


def test_single_files_that_are_accepted_hold_nothing_but_data(report: dict[str, Any]) -> None:
    """K20: what they name besides is a ``Refused``."""
    accepted = {
        name
        for name, said in report["outcomes"].items()
        if not said["read_file"].startswith("[DT40")
    }
    programs = {"program-eval.pt", "program-bytearray.pt", "program-memo.pt"}
    empty = {"alone-header-more.safetensors"}  # has a tensor without items, as it says
    assert accepted <= {f"torch.{suffix}" for suffix in SUFFIXES} | programs | empty
    for name in accepted & {f"torch.{suffix}" for suffix in SUFFIXES}:
        assert "Refused(kind='posix.system'" in report["outcomes"][name]["read_file"]


def test_a_directory_swapped_for_a_link_while_it_is_read_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K6"""
    io = DirectoryCheckpointIO()
    io.save({"w": torch.zeros(3)}, str(tmp_path / "a"))
    io.save({"w": torch.ones(3)}, str(tmp_path / "other"))
    lazy = io.open(str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "a").symlink_to("other")
    assert torch.equal(lazy["w"].read(), torch.zeros(3))


def test_what_foreign_files_name_is_refused_in_place(tmp_path: Path) -> None:
    """K20: also what looks like a part of torch."""
    marker = tmp_path / "ran"
    torch.save(OrderedDict(bomb=Bomb(str(marker)), w=torch.ones(1)), tmp_path / "a.pt")
    back = DirectoryCheckpointIO().read_file(str(tmp_path / "a.pt"))
    assert back["bomb"].kind == "posix.system"
    assert torch.equal(back["w"], torch.ones(1))
    assert not marker.exists()
    with pytest.raises(CheckpointError, match="no codec"):
        DirectoryCheckpointIO().save(back, str(tmp_path / "b"))


def test_a_tree_that_would_fill_the_memory_is_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = DirectoryCheckpointIO()
    io.save({"text": "x" * 5000}, str(tmp_path / "x"))
    for module in ("reading", "writing"):
        monkeypatch.setattr(f"drivetrain_toolkit.{module}.LONGEST_STATE", 4000)
    with pytest.raises(CheckpointError, match=r"'state.json'.* bytes"):
        io.load(str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="bytes of plain values, more than the 4000"):
        io.save({"text": "x" * 5000}, str(tmp_path / "y"))
