"""Checkpoints as directories: tensors, a tree in JSON, and a manifest that makes them one.

Rules: docs/contracts/checkpoint.md. ``NAME.ckpt/`` holds three files::

    tensors.safetensors   all tensors, by their place in the tree
    state.json            the tree, with names in place of tensors
    manifest.json         versions, sizes and hashes; written last

A directory is written under a hidden name and renamed when it is complete and on the disk.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import torch
import xxhash
from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.errors import CheckpointError, StorageError

from drivetrain_toolkit import durable
from drivetrain_toolkit.codecs import CODECS, Codecs
from drivetrain_toolkit.tensorfile import TensorFacts, TensorShelf, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FORMAT: Final = "drivetrain.checkpoint"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
TENSORS: Final = "tensors.safetensors"

_SINGLE_FILES: Final = (b"PK\x03\x04", b"\x80")  # torch.save: a zip archive; before 1.6 a pickle
_OTHER: Final = "Use another checkpoint."


@dataclass(frozen=True, slots=True)
class Manifest:
    """What makes a directory a checkpoint.

    Attributes:
        created: Time of saving, UTC, ISO 8601 with microseconds, so that text order is time order.
        producer: Distributions and versions that wrote it.
        contract: The contract that they were written for.
        world_size: Processes of the run, or None where the writer was not told.
        files: Size in bytes and XXH3 hash by file name.
        tensors: Dtype and shape by name.
    """

    created: str
    producer: str
    contract: str
    world_size: int | None
    files: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, TensorFacts]

    def text(self) -> bytes:
        """The bytes of the file. The same manifest always has the same."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "contract": self.contract,
            "producer": self.producer,
            "created": self.created,
            "world_size": self.world_size,
            "files": {
                name: {"size": size, "xxh3_128": digest}
                for name, (size, digest) in sorted(self.files.items())
            },
            "tensors": {
                name: {"dtype": facts.dtype, "shape": list(facts.shape)}
                for name, facts in sorted(self.tensors.items())
            },
        }
        inner = json.dumps(body, indent=1).encode("ascii")
        body["xxh3_128"] = xxhash.xxh3_128_hexdigest(inner)
        return json.dumps(body, indent=1).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, text: bytes, path: str) -> Manifest:
        """Read it, and make sure that not one bit has changed.

        Raises:
            CheckpointError: It is damaged, of another format, or of a later version.
        """
        try:
            body = json.loads(text.decode("ascii"))
            if body["format"] == FORMAT and body["version"] != VERSION:
                raise CheckpointError(
                    f"The checkpoint {path!r} has format version {body['version']!r}, "
                    f"and version {VERSION} can be read here.",
                    "Upgrade drivetrain-toolkit.",
                )
            manifest = cls(
                created=body["created"],
                producer=body["producer"],
                contract=body["contract"],
                world_size=body["world_size"],
                files={name: (f["size"], f["xxh3_128"]) for name, f in body["files"].items()},
                tensors={
                    name: TensorFacts(facts["dtype"], tuple(facts["shape"]))
                    for name, facts in body["tensors"].items()
                },
            )
            unchanged = manifest.text() == text
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(
                path, MANIFEST, f"it is not readable ({type(error).__name__})"
            ) from error
        if not unchanged:
            raise _damaged(path, MANIFEST, "it is not as it was written")
        return manifest


class DirectoryCheckpointIO:
    """Writes and reads checkpoints as directories of a local or mounted file system.

    Args:
        codecs: What values may be in a tree; by default those of this process.
        producer: What wrote the checkpoints, for their manifests.
        world_size: How many processes the run has, for their manifests.
    """

    def __init__(
        self, codecs: Codecs = CODECS, *, producer: str = "", world_size: int | None = None
    ) -> None:
        self._codecs = codecs
        self._producer = producer
        self._world_size = world_size

    def save(self, tree: Mapping[str, Any], path: str) -> None:
        """Write ``tree`` to the directory ``path``; return once it is complete and on the disk.

        A checkpoint of that name is replaced; at no moment is there neither.

        Raises:
            CheckpointError: A value has no codec (nothing is written), or ``path`` is something
                else than a checkpoint.
            StorageError: The directory cannot be written. Nothing of the new checkpoint is left.
        """
        path = _local(path)
        shelf = TensorShelf()
        state = json.dumps(self._codecs.encode(tree, shelf.keep), allow_nan=False).encode("ascii")
        with _storage("written", path):
            durable.make_directories(os.path.dirname(path))
            _refuse_to_replace(path)
            durable.sweep(path)
            draft = durable.hidden_sibling(path)
            try:
                os.mkdir(draft)
                self._fill(draft, state, shelf)
                durable.publish(draft, path)
            except BaseException:
                with suppress(OSError):  # the first error is the one to show
                    durable.discard(draft)
                raise

    def load(self, path: str) -> dict[str, Any]:
        """Read the tree back, with tensors on the host. Runs no code from the files.

        Raises:
            CheckpointError: There is no complete, undamaged checkpoint of this format.
            StorageError: It cannot be read.
        """
        path = _local(path)
        with _storage("read", path):
            folder = _located(path)
            manifest = self._verify(folder)
            tensors = read_tensors(os.path.join(folder, TENSORS), manifest.tensors)
            try:
                state = json.loads(_read(folder, STATE))
                tree = self._codecs.decode(state, tensors)
            except (ValueError, RecursionError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise _damaged(path, STATE, f"it is not JSON ({error})") from error
        if not isinstance(tree, dict):
            raise _damaged(path, STATE, f"it holds a {type(tree).__name__}, not a mapping")
        return tree

    def exists(self, path: str) -> bool:
        """Whether a complete checkpoint is there: a manifest, and files of the right sizes."""
        path = _local(path)
        with _storage("read", path):
            try:
                self._check_files(_located(path))
            except CheckpointError:
                return False
        return True

    def remove(self, path: str) -> None:
        """Delete it: first from view, in one step, then from the disk. Missing is not an error.

        Raises:
            CheckpointError: ``path`` is something else than a checkpoint.
            StorageError: It cannot be deleted.
        """
        path = _local(path)
        with _storage("removed", path):
            _refuse_to_replace(path)
            for name in (path, durable.replaced_name(path)):
                durable.withdraw(name)

    def list(self, directory: str) -> list[str]:
        """Paths of complete checkpoints in ``directory``, the newest first.

        Raises:
            StorageError: The directory cannot be read. One that is missing holds none.
        """
        directory = _local(directory)
        found: list[tuple[str, str]] = []
        with _storage("read", directory):
            try:
                names = os.listdir(directory)
            except FileNotFoundError:
                return []
            for name in names:
                path = _visible(os.path.join(directory, name))
                if path is None or (path, name) in found:
                    continue
                with suppress(CheckpointError, FileNotFoundError):  # being removed just now
                    found.append((self._check_files(_located(path)).created, path))
        return [path for _, path in sorted(found, reverse=True)]

    def manifest(self, path: str) -> Manifest:
        """What a checkpoint says about itself, without reading it whole. Raises as ``load``."""
        path = _local(path)
        with _storage("read", path):
            return self._check_files(_located(path))

    def _fill(self, draft: str, state: bytes, shelf: TensorShelf) -> None:
        files = {
            TENSORS: durable.write_file(
                os.path.join(draft, TENSORS), lambda write: write_tensors(shelf.tensors, write)
            ),
            STATE: durable.write_file(os.path.join(draft, STATE), lambda write: write(state)),
        }
        manifest = Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            producer=self._producer or _producer(),
            contract=str(CONTRACT),
            world_size=self._world_size,
            files=files,
            tensors=shelf.facts(),
        )
        durable.sync_directory(draft)  # before the manifest, which vouches for the others
        durable.write_file(os.path.join(draft, MANIFEST), lambda write: write(manifest.text()))
        durable.sync_directory(draft)

    def _verify(self, folder: str) -> Manifest:
        manifest = self._check_files(folder)
        for name, (_, digest) in manifest.files.items():
            if durable.hash_file(os.path.join(folder, name)) != digest:
                raise _damaged(folder, name, "its content is not what was written")
        return manifest

    def _check_files(self, folder: str) -> Manifest:
        """The manifest, once names, kinds and sizes of all files agree with it."""
        present = _regular_files(folder)
        if MANIFEST not in present:
            raise CheckpointError(
                f"The directory {folder!r} was to be read as a checkpoint, and has no {MANIFEST}.",
                "Give the path of a directory that a checkpoint was saved to.",
            )
        manifest = Manifest.parse(_read(folder, MANIFEST), folder)
        if set(manifest.files) != {STATE, TENSORS}:
            raise _damaged(folder, MANIFEST, f"it names the files {sorted(manifest.files)}")
        for name, (size, _) in manifest.files.items():
            if name not in present:
                raise _damaged(folder, name, "it is missing")
            if present[name] != size:
                raise _damaged(folder, name, f"it has {present[name]} bytes of {size}")
        extra = sorted(present.keys() - manifest.files.keys() - {MANIFEST})
        if extra:
            raise _damaged(folder, extra[0], "the manifest does not name it")
        return manifest


def _regular_files(folder: str) -> dict[str, int]:
    """Sizes by name. Anything else than a plain file is refused, links to elsewhere included."""
    found: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            facts = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(facts.st_mode):
                raise _damaged(folder, entry.name, "it is not a plain file")
            found[entry.name] = facts.st_size
    return found


def _read(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), "rb") as file:
        return file.read()


def _local(path: str) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise StorageError(
            f"The path {text!r} is on another system, and this checkpoint IO writes to file "
            "systems of this machine.",
            "Mount it, or use a checkpoint IO for it.",
        )
    return os.path.abspath(os.path.expanduser(text))


def _located(path: str) -> str:
    """The directory to read for ``path``: itself, or the one that a killed process put aside."""
    if os.path.isdir(path):
        return path
    aside = durable.replaced_name(path)
    if not os.path.lexists(path) and os.path.isdir(aside):
        return aside
    if not os.path.lexists(path):
        raise CheckpointError(
            f"A checkpoint was to be read from {path!r}, where there is nothing.",
            "Give the path of a saved checkpoint.",
        )
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(_SINGLE_FILES):
        raise CheckpointError(
            f"A checkpoint was to be read from {path!r}, which is a single file as torch.save "
            "writes it; those can run code when they are read.",
            "If you trust it, read it with torch.load(path, weights_only=True) and save its "
            "content again as a checkpoint of this format.",
        )
    raise CheckpointError(
        f"A checkpoint was to be read from {path!r}, which is a file and not a directory.",
        "Give the path of a directory that a checkpoint was saved to.",
    )


def _visible(path: str) -> str | None:
    """The path that a directory entry stands for as a checkpoint, if it may be one."""
    folder, name = os.path.split(path)
    if name.startswith(".") and name.endswith(".replaced"):
        name = name[1 : -len(".replaced")]
        return None if os.path.lexists(os.path.join(folder, name)) else os.path.join(folder, name)
    return path if os.path.isdir(path) and not name.startswith(".") else None


def _refuse_to_replace(path: str) -> None:
    """Whatever is at ``path`` is going to be deleted: let it be a checkpoint, or empty."""
    if not os.path.lexists(path):
        return
    if os.path.isdir(path) and (
        os.path.exists(os.path.join(path, MANIFEST)) or not os.listdir(path)
    ):
        return
    raise CheckpointError(
        f"The checkpoint {path!r} was to be replaced or removed, and what is there is not one.",
        "Choose another path, or move away what is there.",
    )


def _damaged(folder: str, name: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {folder!r} cannot be used because of its file {name!r}: {how}.", _OTHER
    )


def _producer() -> str:
    return f"drivetrain-toolkit {metadata.version('drivetrain-toolkit')}, torch {torch.__version__}"


@contextmanager
def _storage(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"The checkpoint {path!r} was to be {what}, and the system refused: "
            f"{error.strerror or error} (file {error.filename or path!r}).",
            "Make sure that the directory exists, that it may be written, and that there is room.",
        ) from error
