"""Checkpoints in an object store, or whatever else fsspec reaches.

Objects cannot be renamed in one step, so that a checkpoint is not written under another name first.
Its files have names that no other save uses; the manifest, which alone says which of them are the
checkpoint, is written last, and that in one step. Files of the save before go only then.
"""

from __future__ import annotations

import random
import re
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import xxhash
from drivetrain_interfaces.errors import CheckpointError, StorageError

from drivetrain_toolkit.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from drivetrain_toolkit.stores import Fill

T = TypeVar("T")

_TRIES: Final = 6
_FIRST_PAUSE: Final = 0.1  # seconds; doubled at every try, and a random part of it is waited
_AHEAD: Final = 1 << 23  # bytes that are read at once, at least
_PART: Final = 1 << 23  # bytes of a part of an upload; S3 takes no less than 5 MiB
_OURS: Final = re.compile(r"(tensors[0-9-]*-|state-|note-)[0-9A-Za-z]+[-.][A-Za-z0-9.-]+")
# Libraries below fsspec whose errors of the network are not always OSError.
_NETWORK: Final = ("aiohttp", "aiobotocore", "botocore", "requests", "urllib3", "http")


class ObjectSource:
    """A checkpoint that is read from a store."""

    exact = False  # a save that was killed leaves files that no manifest names

    def __init__(self, fs: Any, key: str, path: str) -> None:
        self.path = path
        self._fs = fs
        self._key = key
        self.files: Mapping[str, int] = _sizes(fs, key)
        if not self.files:
            raise CheckpointError(
                f"A checkpoint was to be read from {path!r}, where there is nothing.",
                "Give the path of a saved checkpoint.",
            )

    @contextmanager
    def open(self, name: str) -> Iterator[RangeReader]:
        """A file of it."""
        yield RangeReader(self._fs, f"{self._key}/{name}", self.files[name])

    def replaced(self) -> bool:
        """Whether other files are there by now."""
        return _sizes(self._fs, self._key) != self.files

    def close(self) -> None:
        """Nothing is open between two reads."""


class RangeReader:
    """Reads an object piece by piece; a piece that fails is asked for again."""

    def __init__(self, fs: Any, key: str, size: int) -> None:
        self._fs = fs
        self._key = key
        self._size = size
        self._position = 0
        self._ahead = memoryview(b"")

    def readinto(self, buffer: Any, /) -> int:
        """Fill a part of ``buffer``."""
        target = memoryview(buffer)
        if not self._ahead:
            end = min(self._size, self._position + max(_AHEAD, len(target)))
            if end <= self._position:
                return 0
            data = again(lambda: self._fs.cat_file(self._key, start=self._position, end=end))
            self._ahead = memoryview(data)
            if not data:
                return 0
        count = min(len(target), len(self._ahead))
        target[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        self._position += count
        return count

    def seek(self, offset: int, /) -> int:
        """Go to a position."""
        self._position, self._ahead = offset, memoryview(b"")
        return offset


class ObjectDraft:
    """Objects with names of their own, until a manifest names them."""

    longest_nap = 0.5

    def __init__(self, fs: Any, key: str, token: str) -> None:
        self._fs = fs
        self._key = key
        self._token = token

    def name(self, wanted: str) -> str:
        """With the token, so that nothing of another save is written over."""
        stem, _, suffix = wanted.rpartition(".")
        return f"{stem}-{self._token}.{suffix}"

    def write(self, name: str, fill: Fill, size: int = 0) -> tuple[int, str]:
        """Upload a file in parts; all of it again if a part cannot be."""

        def upload() -> tuple[int, str]:
            digest, size = xxhash.xxh3_128(), 0
            file = self._fs.open(f"{self._key}/{name}", "wb", block_size=_PART)

            def append(data: Any) -> None:
                nonlocal size
                digest.update(data)
                size += len(data)
                file.write(data)

            try:
                fill(append)
            except BaseException:
                with suppress(Exception):  # the first error is the one to show
                    file.discard()
                raise
            file.close()
            return size, digest.hexdigest()

        size, digest = again(upload)
        stored = again(lambda: self._fs.info(f"{self._key}/{name}"))["size"]
        if stored != size:
            raise OSError(f"{stored} bytes of {size} are in the store")
        return size, digest

    def publish(self, manifest: bytes) -> None:
        """The manifest, in one request; then what it does not name goes."""
        again(lambda: self._fs.pipe_file(f"{self._key}/{MANIFEST}", manifest))
        for name in _sizes(self._fs, self._key):
            if _OURS.fullmatch(name) and not (self._token in name and not name.startswith("note-")):
                _delete(self._fs, f"{self._key}/{name}")

    def abandon(self) -> None:
        """Delete what was written, as far as that is possible."""
        with suppress(Exception):  # the error that led here is the one to show
            for name in _sizes(self._fs, self._key):
                if self._token in name:
                    _delete(self._fs, f"{self._key}/{name}")

    def tell(self, name: str, data: bytes) -> None:
        """One object."""
        # An empty one would be a folder to some stores.
        again(lambda: self._fs.pipe_file(f"{self._key}/{self._note(name)}", b"." + data))

    def notes(self) -> Mapping[str, int]:
        """What is there by now; nothing once it is published or abandoned."""
        found = _sizes(self._fs, self._key)
        return {
            name.removeprefix(self._note("")): size
            for name, size in found.items()
            if name.startswith("note-") and self._token in name
        }

    def note(self, name: str) -> bytes:
        """What a note says."""
        data: bytes = again(lambda: self._fs.cat_file(f"{self._key}/{self._note(name)}"))
        return data[1:]

    def _note(self, name: str) -> str:
        return f"note-{self._token}-{name}"


class ObjectStore:
    """Anything that has a URL.

    Args:
        url: Of any checkpoint in it; says which store it is.
        options: For the library that reaches it, such as ``{"anon": True}``.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._fs = _file_system(url, options)

    def open(self, path: str) -> ObjectSource:
        """What is there now."""
        return ObjectSource(self._fs, self._key(path), path)

    def begin(self, path: str, token: str) -> ObjectDraft:
        """Names for a new save. What is no checkpoint is not touched."""
        key = self._key(path)
        self._refuse_others(path, key)
        draft = ObjectDraft(self._fs, key, token)
        draft.tell("begun", b"")
        return draft

    def join(self, path: str, token: str) -> ObjectDraft | None:
        """The same names, once process 0 has begun."""
        draft = ObjectDraft(self._fs, self._key(path), token)
        return draft if draft.notes() else None

    def remove(self, path: str) -> None:
        """First the manifest, then the rest."""
        key = self._key(path)
        names = _sizes(self._fs, key)
        self._refuse_others(path, key)
        for name in sorted(names, key=lambda each: each != MANIFEST):
            _delete(self._fs, f"{key}/{name}")

    def candidates(self, directory: str) -> list[str]:
        """Everything that looks like a folder."""
        key = self._key(directory)
        return [
            f"{directory.rstrip('/')}/{entry['name'].rstrip('/').rpartition('/')[2]}"
            for entry in _entries(self._fs, key)
            if entry["type"] == "directory"
        ]

    def is_file(self, path: str) -> bool:
        """Whether one object has exactly this name."""
        return bool(again(lambda: self._fs.isfile(self._key(path))))

    def exists(self, path: str) -> bool:
        """Whether there is anything, an object or what looks like a folder."""
        self._fs.invalidate_cache()  # others write too
        return bool(again(lambda: self._fs.exists(self._key(path))))

    def fetch(self, path: str, target: str) -> None:
        """Copy an object to a file of this machine."""
        again(lambda: self._fs.get_file(self._key(path), target))

    def put(self, source: str, path: str) -> None:
        """Copy a file of this machine to an object, which appears as a whole."""
        again(lambda: self._fs.put_file(source, self._key(path)))

    def _key(self, path: str) -> str:
        return str(self._fs._strip_protocol(path)).rstrip("/")  # noqa: SLF001 - fsspec's way

    def _refuse_others(self, path: str, key: str) -> None:
        names = _sizes(self._fs, key)
        if MANIFEST in names or all(_OURS.fullmatch(name) for name in names):
            return
        raise CheckpointError(
            f"The checkpoint {path!r} was to be replaced or removed, and what is there is not one.",
            "Choose another path, or move away what is there.",
        )


def again(request: Callable[[], T]) -> T:
    """Ask until it works, with growing pauses; what that cannot change is raised at once."""
    pause = _FIRST_PAUSE
    for attempt in range(_TRIES):
        try:
            return request()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            network = type(error).__module__.partition(".")[0] in _NETWORK
            if not isinstance(error, OSError) and not network:
                raise
            if attempt + 1 == _TRIES:
                raise OSError(f"{type(error).__name__}: {error}") from error
        time.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - no secret
        pause *= 2
    raise AssertionError("unreachable")


def _delete(fs: Any, key: str) -> None:
    with suppress(FileNotFoundError):
        again(lambda: fs.rm_file(key))


def _entries(fs: Any, key: str) -> list[dict[str, Any]]:
    fs.invalidate_cache()  # others write too
    try:
        found: list[dict[str, Any]] = again(lambda: fs.ls(key, detail=True))
    except FileNotFoundError:
        return []
    return found


def _sizes(fs: Any, key: str) -> dict[str, int]:
    return {
        entry["name"].rpartition("/")[2]: int(entry["size"])
        for entry in _entries(fs, key)
        if entry["type"] == "file" and entry["name"].rstrip("/") != key
    }


def _file_system(url: str, options: Mapping[str, Any]) -> Any:
    try:
        from fsspec.core import url_to_fs

        fs, _ = url_to_fs(url, **options)
    except ImportError as error:
        raise StorageError(
            f"The path {url!r} needs a library that is not installed: {error}.",
            "Install it, for instance with drivetrain-toolkit[fsspec].",
        ) from error
    except ValueError as error:
        raise StorageError(
            f"The path {url!r} is of a kind that fsspec does not know.",
            "Use a URL such as s3://bucket/run, or a path of this machine.",
        ) from error
    return fs
