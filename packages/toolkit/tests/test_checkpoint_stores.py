"""Checkpoints in object stores: a real S3-compatible server on loopback, through s3fs.

Rules K23 and K24 of docs/contracts/checkpoint.md. Between client and server is a proxy that answers
500, closes sockets, and cuts connections in the middle.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import select
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces.checkpoint import SaveGroup, Shard
from drivetrain_interfaces.errors import CheckpointError, StorageError

from drivetrain_toolkit import objectstore
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = Path(__file__).with_name("s3_server.py")
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
# Nothing of this machine's configuration is asked for, and no metadata server.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::DeprecationWarning",
)


class Proxy:
    """Passes connections on, and now and then does not."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.faults = {"500": 0, "closed": 0, "cut": 0}
        self.probability = 0.0
        self._random = random.Random(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        # A connection of our own ends the wait for one.
        address = self._listener.getsockname()
        self.port = 0
        socket.create_connection(address).close()
        self._thread.join(30)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self.port:
                client.close()
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            fault = ""
            if self._random.random() < self.probability:
                fault = self._random.choice(list(self.faults))
                self.faults[fault] += 1
            if fault == "closed":
                return
            if fault == "500":
                client.recv(1 << 16)
                client.sendall(BROKEN)
                return
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                self._pass_on(client, server, self._random.randrange(200_000) if fault else -1)

    def _pass_on(self, client: socket.socket, server: socket.socket, most: int) -> None:
        other = {client: server, server: client}
        passed = 0
        while True:
            for ready in select.select([client, server], [], [], 60)[0]:
                data = ready.recv(1 << 16)
                passed += len(data)
                if not data or 0 <= most < passed:
                    return
                other[ready].sendall(data)


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs moto and s3fs")
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        proxy = Proxy(int(process.stdout.readline()))
        yield proxy
        proxy.close()
        process.communicate("", timeout=30)


@pytest.fixture
def options(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.probability = 0.0
    return {
        "key": "a",
        "secret": "b",
        "client_kwargs": {"endpoint_url": server.address},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 20},
    }


@pytest.fixture
def fs(options: dict[str, Any]) -> Any:
    import s3fs

    fs = s3fs.S3FileSystem(**options)
    if not fs.exists("bucket"):
        fs.mkdir("bucket")
    return fs


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest) -> tuple[DirectoryCheckpointIO, str, Any]:
    """A checkpoint IO, the URL of a folder, and the file system behind it."""
    name = f"{request.node.originalname[-40:]}"
    if request.param == "s3":
        options, fs = (request.getfixturevalue(each) for each in ("options", "fs"))
        return DirectoryCheckpointIO(storage_options=options), f"s3://bucket/{name}", fs
    import fsspec

    return DirectoryCheckpointIO(), f"memory://{name}", fsspec.filesystem("memory")


def tree(n: int = 0) -> dict[str, Any]:
    return {"w": torch.arange(1000.0) + n, "n": n, "e": torch.empty(0)}


def names(fs: Any, url: str) -> list[str]:
    fs.invalidate_cache()
    return sorted(each.rpartition("/")[2] for each in fs.find(url.partition("://")[2]))


def test_what_is_saved_comes_back(place: tuple[DirectoryCheckpointIO, str, Any]) -> None:
    """K23"""
    io, url, fs = place
    assert not io.exists(f"{url}/a.ckpt")
    assert io.list(url) == []
    for n, name in enumerate(("b", "c", "a")):
        io.save(tree(n), f"{url}/{name}.ckpt")
    back = io.load(f"{url}/a.ckpt")
    assert torch.equal(back["w"], tree(2)["w"])
    assert back["n"] == 2
    assert io.verify(f"{url}/a.ckpt") == []
    assert io.list(url) == [f"{url}/{name}.ckpt" for name in ("a", "c", "b")]
    assert torch.equal(io.open(f"{url}/a.ckpt")["w"].read((7,), (3,)), tree(2)["w"][7:10])
    assert io.prune(url, 1) == [f"{url}/c.ckpt", f"{url}/b.ckpt"]
    io.remove(f"{url}/a.ckpt")
    io.remove(f"{url}/a.ckpt")
    assert names(fs, url) == []


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_single_files_of_a_store_are_written_and_read(
    place: tuple[DirectoryCheckpointIO, str, Any], tmp_path: Path, form: str
) -> None:
    io, url, fs = place
    saved, single = f"{url}/{form}.ckpt", f"{url}/{form}.file"
    io.save({"module": {"w": torch.arange(5.0)}}, saved)
    assert io.convert(saved, single, form) == []
    assert names(fs, single) == [f"{form}.file"]
    assert io.inspect(single).form == form
    assert io.inspect(single).path == single
    again = str(tmp_path / "again.ckpt")
    io.convert(single, again, "directory")
    assert io.diff(single, again) == []
    assert io.read_file(single).keys() == io.load(again).keys()
    with pytest.raises(CheckpointError, match="something already"):
        io.convert(saved, single, form)


def test_replacing_never_shows_a_half(
    place: tuple[DirectoryCheckpointIO, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K24: whoever looks before the last request sees the old one, whole."""
    io, url, fs = place
    io.save(tree(1), f"{url}/x")
    publish = objectstore.ObjectDraft.publish
    seen: list[int] = []

    def look(draft: Any, manifest: bytes) -> None:
        seen.append(io.load(f"{url}/x")["n"])
        publish(draft, manifest)

    monkeypatch.setattr(objectstore.ObjectDraft, "publish", look)
    io.save(tree(2), f"{url}/x")
    assert seen == [1]
    assert io.load(f"{url}/x")["n"] == 2
    assert len(names(fs, f"{url}/x")) == 3


def test_a_save_that_dies_leaves_the_old_one_and_the_next_tidies_up(
    place: tuple[DirectoryCheckpointIO, str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K24"""
    io, url, fs = place
    io.save(tree(1), f"{url}/x")
    with monkeypatch.context() as patch:
        for name in ("publish", "abandon"):  # as if killed right there
            patch.setattr(objectstore.ObjectDraft, name, lambda *arguments: None)
        io.save(tree(2), f"{url}/x")
        io.save(tree(2), f"{url}/new")
    assert len(names(fs, f"{url}/x")) > 3
    assert io.verify(f"{url}/x") == []
    assert io.load(f"{url}/x")["n"] == 1
    assert not io.exists(f"{url}/new")
    io.save(tree(3), f"{url}/x")
    io.save(tree(3), f"{url}/new")
    assert len(names(fs, f"{url}/x")) == len(names(fs, f"{url}/new")) == 3


def test_what_is_no_checkpoint_is_not_touched(
    place: tuple[DirectoryCheckpointIO, str, Any],
) -> None:
    io, url, fs = place
    fs.pipe_file(f"{url}/thesis/chapter".partition("://")[2], b"x")
    for act in (lambda: io.save(tree(), f"{url}/thesis"), lambda: io.remove(f"{url}/thesis")):
        with pytest.raises(CheckpointError, match="is not one"):
            act()
    assert names(fs, f"{url}/thesis") == ["chapter"]


def test_damage_is_found(place: tuple[DirectoryCheckpointIO, str, Any]) -> None:
    """K5"""
    io, url, fs = place
    io.save(tree(), f"{url}/x")
    for name in names(fs, f"{url}/x"):
        key = f"{url}/x/{name}".partition("://")[2]
        data = bytearray(fs.cat_file(key))
        data[len(data) // 2] ^= 1
        fs.pipe_file(key, bytes(data))
        assert io.verify(f"{url}/x") != [], name
        with pytest.raises(CheckpointError):
            io.load(f"{url}/x")
        data[len(data) // 2] ^= 1
        fs.pipe_file(key, bytes(data))
    assert io.verify(f"{url}/x") == []


def test_several_processes_save_to_a_store(
    place: tuple[DirectoryCheckpointIO, str, Any], request: pytest.FixtureRequest
) -> None:
    """K16"""
    io, url, fs = place
    whole = torch.arange(12.0).reshape(4, 3)

    def one(rank: int) -> None:
        shard = Shard(whole[2 * rank : 2 * rank + 2], (2 * rank, 0), (4, 3))
        own = DirectoryCheckpointIO(storage_options=io._storage_options)
        own.save_sharded({"w": shard, "n": 1}, f"{url}/x", SaveGroup(rank, 2, "t1", 60))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(2))) == [None, None]
    assert torch.equal(io.load(f"{url}/x")["w"], whole)
    assert len(names(fs, f"{url}/x")) == 4


def test_errors_and_dropped_connections_are_survived(
    server: Proxy, options: dict[str, Any], fs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K23: parts of an upload too; what comes back is whole."""
    monkeypatch.setattr(objectstore, "_FIRST_PAUSE", 0.01)
    # A connection serves one request, so that each may fail.
    options = {**options, "config_kwargs": {**options["config_kwargs"], "max_pool_connections": 1}}
    io = DirectoryCheckpointIO(storage_options=options)
    large = {"w": torch.randn(3_000_000), "n": 5}  # 12 MB: several parts
    io.save(large, "s3://bucket/faults/y")
    server.probability = 0.3
    for n in range(4):
        io = DirectoryCheckpointIO(
            storage_options={**options, "use_listings_cache": False, "skip_instance_cache": True}
        )
        io.save({**large, "n": n}, "s3://bucket/faults/x")
        assert torch.equal(io.load("s3://bucket/faults/x")["w"], large["w"])
    server.probability = 0.0
    assert io.verify("s3://bucket/faults/x") == []
    assert io.load("s3://bucket/faults/x")["n"] == 3
    assert len(names(fs, "s3://bucket/faults/x")) == 3
    assert all(server.faults.values()), server.faults


def test_a_large_file_is_uploaded_in_parts(options: dict[str, Any], fs: Any) -> None:
    io = DirectoryCheckpointIO(storage_options=options)
    io.save({"w": torch.randn(3_000_000)}, "s3://bucket/parts/x")
    (key,) = [each for each in fs.find("bucket/parts/x") if "tensors" in each]
    assert fs.info(key)["ETag"].strip('"').endswith("-2")  # as S3 marks objects of two parts


def test_a_store_that_is_down_is_a_storage_error(
    server: Proxy, options: dict[str, Any], fs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "_FIRST_PAUSE", 0.001)
    io = DirectoryCheckpointIO(storage_options={**options, "skip_instance_cache": True})
    server.probability = 1.0
    server.faults = {"500": 0}
    with pytest.raises(StorageError, match="down"):
        io.save(tree(), "s3://bucket/down/x")
    server.probability = 0.0
    server.faults = {"500": 0, "closed": 0, "cut": 0}
    assert not io.exists("s3://bucket/down/x")


def test_requests_are_repeated_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """K23"""
    pauses: list[float] = []
    monkeypatch.setattr(objectstore.time, "sleep", pauses.append)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ConnectionResetError("gone")

    with pytest.raises(OSError, match="ConnectionResetError: gone"):
        objectstore.again(fail)
    assert len(calls) == len(pauses) + 1 == 6
    assert all(0.05 * 2**n <= pause <= 0.1 * 2**n for n, pause in enumerate(pauses))
    for error in (FileNotFoundError, PermissionError, ValueError):
        calls.clear()

        def refuse(error: type[Exception] = error) -> None:
            calls.append(1)
            raise error("no")

        with pytest.raises(error):
            objectstore.again(refuse)
        assert len(calls) == 1


def test_urls_of_this_machine_and_unknown_ones(tmp_path: Path) -> None:
    io = DirectoryCheckpointIO()
    io.save(tree(4), f"file://{tmp_path}/x")
    assert io.load(str(tmp_path / "x"))["n"] == 4
    with pytest.raises(StorageError, match="a kind that fsspec does not know"):
        io.save(tree(), "nosuch://bucket/x")
