"""Checkpoints as directories: tensors, a tree in JSON, and a manifest that makes them one.

Rules: docs/contracts/checkpoint.md; format: docs/checkpoints.md. ``NAME.ckpt/`` holds::

    tensors.safetensors   all tensors, by their place in the tree (several such files, if several
                          processes wrote them)
    state.json            the tree, with names in place of tensors
    manifest.json         versions, sizes and hashes; written last

A directory is written under a hidden name and renamed when it is complete and on the disk.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import torch
from drivetrain_interfaces.checkpoint import CheckpointFacts, Difference, TensorEntry
from drivetrain_interfaces.errors import CheckpointError, ConfigurationError, StorageError

from drivetrain_toolkit.background import ThreadedSave
from drivetrain_toolkit.codecs import CODECS, Codecs, dtype_name
from drivetrain_toolkit.comparing import Content, differences, values_of
from drivetrain_toolkit.lazy import lazy_tensors
from drivetrain_toolkit.localstore import LocalStore
from drivetrain_toolkit.manifest import MANIFEST, STATE, VERSION, Manifest, damaged
from drivetrain_toolkit.objectstore import ObjectStore
from drivetrain_toolkit.reading import (
    content_problem,
    file_problems,
    parse_manifest,
    parse_state,
    read_all,
    read_manifest,
)
from drivetrain_toolkit.singlefile import (
    DIRECTORY,
    SAFETENSORS,
    TORCH,
    form_of,
    read_single,
    without_refused,
    write_safetensors,
    write_torch,
)
from drivetrain_toolkit.together import JointSave
from drivetrain_toolkit.writing import TENSORS, Origin, Staged, stage, write_alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from drivetrain_interfaces.checkpoint import SaveGroup
    from typing_extensions import TypeVar

    from drivetrain_toolkit.stores import Source, Store

    T = TypeVar("T")

__all__ = ["MANIFEST", "STATE", "TENSORS", "DirectoryCheckpointIO", "Manifest"]

_LOCAL: Final = ("file://", "local://")
_TRIES: Final = 5  # of a reader whose checkpoint is replaced before it has opened all files


class DirectoryCheckpointIO:
    """Writes and reads checkpoints as directories of a file system, or of any fsspec store by URL.

    One thread uses it. Besides ``CheckpointIO`` it offers every optional ability of
    ``drivetrain_interfaces.checkpoint``.

    Args:
        codecs: What values may be in a tree; by default those of this process.
        producer: What wrote the checkpoints, for their manifests.
        world_size: How many processes the run has, for their manifests.
        storage_options: For the library that reaches an object store.
    """

    def __init__(
        self,
        codecs: Codecs = CODECS,
        *,
        producer: str = "",
        world_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._codecs = codecs
        self._producer = producer
        self._world_size = world_size
        self._storage_options = dict(storage_options or {})
        self._stores: dict[str, Store] = {}
        self._pending: ThreadedSave | None = None

    def save(self, tree: Mapping[str, Any], path: str) -> None:
        """Write ``tree`` to the directory ``path``; return once it is complete and on the disk.

        A checkpoint of that name is replaced; at no moment is there neither.

        Raises:
            CheckpointError: A value has no codec (nothing is written), or ``path`` is something
                else than a checkpoint. Also what went wrong in a save in the background.
            StorageError: The directory cannot be written. Nothing of the new checkpoint is left.
        """
        path = _full(path)
        self._finish_pending()
        self._write(stage(tree, self._codecs), path)

    def begin_save(
        self,
        tree: Mapping[str, Any],
        path: str,
        *,
        staged: bool = False,
        group: SaveGroup | None = None,
    ) -> ThreadedSave:
        """Take a copy of ``tree``, and return while it is being written.

        A save that is still under way is waited for first. The copy takes as much memory as the
        tensors of this process; with ``staged`` there is none.

        Raises:
            CheckpointError: A value has no codec; nothing is written. Also what went wrong in the
                save before.
            StorageError: What went wrong in the save before.
        """
        path = _full(path)
        self._finish_pending()
        work = self._write if group is None else partial(self._write_part, group=group)
        with self._told_to(path, group):
            ready = stage(tree, self._codecs, copy=not staged)
        self._pending = ThreadedSave(partial(_once, [ready], work, path), path)
        return self._pending

    def save_sharded(self, tree: Mapping[str, Any], path: str, group: SaveGroup) -> None:
        """Write this process's part of a checkpoint; return once all are on the disk.

        Raises:
            CheckpointError: Shards do not make up their tensors, or a process failed or is missing.
            StorageError: A file cannot be written.
        """
        path = _full(path)
        self._finish_pending()
        with self._told_to(path, group):
            ready = stage(tree, self._codecs)
        self._write_part(ready, path, group)

    def load(self, path: str) -> dict[str, Any]:
        """Read the tree back, with tensors on the host. Runs no code from the files.

        Raises:
            CheckpointError: There is no complete, undamaged checkpoint of this format.
            StorageError: It cannot be read.
        """
        return self._read(path, self._load)

    def open(self, path: str) -> dict[str, Any]:
        """The tree with a ``LazyTensor`` in place of each tensor. Raises as ``load``."""
        path = _full(path)
        with _storage("read", path):
            source = self._store(path).open(path)
            manifest = read_manifest(source)
            tensors = lazy_tensors(source, manifest, partial(_storage, "read", path))
            return self._decoded(source, manifest, tensors, parse_state(source, manifest))

    def exists(self, path: str) -> bool:
        """Whether a complete checkpoint is there: a manifest, and files of the right sizes."""
        try:
            self.manifest(path)
        except CheckpointError:
            return False
        return True

    def remove(self, path: str) -> None:
        """Delete it: first from view, in one step, then from the disk. Missing is not an error.

        Raises:
            CheckpointError: ``path`` is something else than a checkpoint.
            StorageError: It cannot be deleted.
        """
        path = _full(path)
        self._await_pending(path)
        with _storage("removed", path):
            self._store(path).remove(path)

    def list(self, directory: str) -> list[str]:
        """Paths of complete checkpoints in ``directory``, the newest first.

        Raises:
            StorageError: The directory cannot be read. One that is missing holds none.
        """
        directory = _full(directory)
        found: list[tuple[str, str]] = []
        with _storage("read", directory):
            for path in self._store(directory).candidates(directory):
                with suppress(CheckpointError, FileNotFoundError):  # being removed just now
                    found.append((self._look(path).created, path))
        return [path for _, path in sorted(found, reverse=True)]

    def verify(self, path: str) -> Sequence[str]:
        """What is wrong with every file, one line each; nothing if all is as it was written.

        Raises:
            StorageError: It cannot be read.
        """
        try:
            return self._read(path, _problems)
        except CheckpointError as error:
            return [error.message]

    def inspect(self, path: str) -> CheckpointFacts:
        """What a checkpoint or single file says about itself. Raises as ``load``."""
        path = _full(path)
        with _storage("read", path):
            if self._is_single(path):
                return self._facts_of_file(path)
        return self._read(path, _facts)

    def diff(self, first: str, second: str) -> Sequence[Difference]:
        """Where two checkpoints or single files differ. Raises as ``load``."""
        return differences(self._content(_full(first)), self._content(_full(second)))

    def convert(self, source: str, target: str, form: str) -> Sequence[str]:
        """Write what is at ``source`` to ``target``: ``directory``, ``torch`` or ``safetensors``.

        As ``directory`` it is consolidated: one file of tensors, whoever wrote it.

        Returns:
            What was left out, one place each.

        Raises:
            CheckpointError: The source is damaged, or there is something at the target.
            ConfigurationError: There is no such form.
            StorageError: A file cannot be read or written.
        """
        source, target = _full(source), _full(target)
        self._check_conversion(target, form)
        tree, left_out = without_refused(self._any(source), source)
        if form == DIRECTORY:
            self.save(tree, target)
            return left_out
        with _storage("written", target), self._at_hand(target, new=True) as file:
            if form == SAFETENSORS:
                return [*left_out, *write_safetensors(file, tree)]
            staged = stage(tree, self._codecs)
            write_torch(file, staged.state, staged.shelf.tensors, self._codecs)
        return left_out

    def read_file(self, path: str) -> dict[str, Any]:
        """The tree of a file of ``torch.save`` or safetensors, without running code from it.

        Raises:
            CheckpointError: It is damaged, or no such file.
            StorageError: It cannot be read.
        """
        path = _full(path)
        with _storage("read", path), self._at_hand(path) as file:
            return read_single(file, self._codecs)

    def prune(self, directory: str, keep: int) -> Sequence[str]:
        """Remove all but the ``keep`` newest that are whole, once these have been verified.

        Links stay, and what they lead to.

        Raises:
            ConfigurationError: None would be left.
            StorageError: A file cannot be read or removed.
        """
        if keep < 1:
            raise ConfigurationError(
                f"A directory was to be pruned to {keep} checkpoints.", "Keep one at least."
            )
        paths = self.list(directory)
        linked = {os.path.realpath(path) for path in paths if os.path.islink(path)}
        whole = 0
        gone = []
        for path in paths:
            if os.path.islink(path) or os.path.realpath(path) in linked:
                continue
            if whole < keep:
                whole += not self.verify(path)
            else:
                self.remove(path)
                gone.append(path)
        return gone

    def manifest(self, path: str) -> Manifest:
        """What a checkpoint says about itself, without reading it whole. Raises as ``load``."""
        path = _full(path)
        self._await_pending(path)
        with _storage("read", path):
            return self._look(path)

    def _load(self, source: Source) -> dict[str, Any]:
        manifest = read_manifest(source)
        state = parse_state(source, manifest)
        return self._decoded(source, manifest, read_all(source, manifest), state)

    def _decoded(
        self,
        source: Source,
        manifest: Manifest,
        tensors: Mapping[str, Any],
        state: Any,
    ) -> dict[str, Any]:
        try:
            tree = self._codecs.decode(state, tensors)
        except RecursionError as error:
            raise damaged(source.path, manifest.state, "it is nested too deeply") from error
        if not isinstance(tree, dict):
            how = f"it holds a {type(tree).__name__}, not a mapping"
            raise damaged(source.path, manifest.state, how)
        return tree

    def _is_single(self, path: str) -> bool:
        store = self._store(path)
        return store.is_file(path) if isinstance(store, ObjectStore) else os.path.isfile(path)

    @contextmanager
    def _at_hand(self, path: str, *, new: bool = False) -> Iterator[str]:
        """A single file as one of this machine, to be read; or ``new``, to be written.

        It goes to ``path`` once that is done.
        """
        store = self._store(path)
        if not isinstance(store, ObjectStore):
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="drivetrain-") as folder:
            file = os.path.join(folder, path.rpartition("/")[2])
            if not new:
                store.fetch(path, file)
            yield file
            if new:
                store.put(file, path)

    def _check_conversion(self, target: str, form: str) -> None:
        if form not in (DIRECTORY, TORCH, SAFETENSORS):
            raise ConfigurationError(
                f"A checkpoint was to be converted to the form {form!r}.",
                f"Use one of {DIRECTORY!r}, {TORCH!r} and {SAFETENSORS!r}.",
            )
        with _storage("written", target):
            store = self._store(target)
            if isinstance(store, ObjectStore):
                taken = store.exists(target)
            else:
                taken = os.path.lexists(target)
        if taken:
            raise CheckpointError(
                f"A checkpoint was to be converted to {target!r}, where there is something "
                "already.",
                "Choose another path, or remove it first.",
            )

    def _any(self, path: str) -> dict[str, Any]:
        return self.read_file(path) if self._is_single(path) else self.load(path)

    def _facts_of_file(self, path: str) -> CheckpointFacts:
        with self._at_hand(path) as file:
            staged = self._staged_file(file)
            form, size = form_of(file), os.path.getsize(file)
        return CheckpointFacts(
            path,
            form,
            files={os.path.basename(path): size},
            tensors={
                name: TensorEntry(dtype_name(each.dtype), tuple(each.shape))
                for name, each in staged.shelf.tensors.items()
            },
            values=values_of(staged.state),
        )

    def _staged_file(self, path: str) -> Staged:
        return stage(without_refused(read_single(path, self._codecs), path)[0], self._codecs)

    def _content(self, path: str) -> Content:
        self._await_pending(path)
        with _storage("read", path):
            if self._is_single(path):
                with self._at_hand(path) as file:
                    staged = self._staged_file(file)
                return Content(staged.state, staged.shelf.tensors)
            source = self._store(path).open(path)
            manifest = read_manifest(source)
            reading = partial(_storage, "read", path)
            state = parse_state(source, manifest)
            return Content(state, lazy_tensors(source, manifest, reading))

    def _look(self, path: str) -> Manifest:
        source = self._store(path).open(path)
        try:
            return read_manifest(source)
        finally:
            source.close()

    def _read(self, path: str, use: Callable[[Source], T]) -> T:
        """Use an opened directory; again if it was replaced before all its files were opened."""
        path = _full(path)
        self._await_pending(path)
        with _storage("read", path):
            for attempt in range(_TRIES):
                source = self._store(path).open(path)
                try:
                    return use(source)
                except (CheckpointError, FileNotFoundError):
                    if attempt + 1 == _TRIES or not source.replaced():
                        raise
                finally:
                    source.close()
        raise AssertionError("unreachable")

    def _write(self, staged: Staged, path: str) -> None:
        with _storage("written", path):
            token = secrets.token_hex(8)
            draft = self._store(path).begin(path, token)
            try:
                write_alone(draft, staged, self._origin(token))
            except BaseException:
                draft.abandon()
                raise

    def _write_part(self, staged: Staged, path: str, group: SaveGroup) -> None:
        with _storage("written", path):
            self._joint(path, group).run(staged)

    @contextmanager
    def _told_to(self, path: str, group: SaveGroup | None) -> Iterator[None]:
        """Tell the other processes of a group if the tree of this one cannot be saved."""
        try:
            yield
        except Exception as error:
            if group is not None:
                with suppress(CheckpointError, OSError):  # the first error is the one to show
                    self._joint(path, group).fail(error)
            raise

    def _joint(self, path: str, group: SaveGroup) -> JointSave:
        return JointSave(self._store(path), path, group, self._origin(group.token))

    def _origin(self, token: str) -> Origin:
        return Origin(self._producer or _producer(), self._world_size, token)

    def _store(self, path: str) -> Store:
        if "://" not in path:
            return LocalStore()
        protocol = path.partition("://")[0]
        if protocol not in self._stores:
            self._stores[protocol] = ObjectStore(path, self._storage_options)
        return self._stores[protocol]

    def _finish_pending(self) -> None:
        """One save at a time; and what went wrong in the one before is told."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def _await_pending(self, path: str) -> None:
        if self._pending is not None and self._pending.path == path:
            self._pending.join()


def _once(ready: list[Staged], work: Callable[[Staged, str], None], path: str) -> None:
    """Work on a staged tree that nothing else refers to, so that its memory is free afterwards."""
    work(ready.pop(), path)


def _facts(source: Source) -> CheckpointFacts:
    manifest = read_manifest(source)
    return CheckpointFacts(
        path=source.path,
        form=DIRECTORY,
        version=VERSION,
        contract=manifest.contract,
        producer=manifest.producer,
        created=manifest.created,
        world_size=manifest.world_size,
        files={name: size for name, (size, _) in manifest.files.items()},
        tensors={
            name: TensorEntry(
                facts.dtype, facts.shape, tuple(sorted({shard.file for shard in facts.shards}))
            )
            for name, facts in manifest.tensors.items()
        },
        values=values_of(parse_state(source, manifest)),
    )


def _problems(source: Source) -> list[str]:
    manifest = parse_manifest(source)
    found = dict(file_problems(source, manifest))
    for name in sorted(manifest.files.keys() - found.keys()):
        if how := content_problem(source, manifest, name):
            found[name] = how
    return [f"{name}: {how}" for name, how in found.items()]


def _full(path: Any) -> str:
    text = str(os.fspath(path))
    for prefix in _LOCAL:
        text = text.removeprefix(prefix)
    return text.rstrip("/") if "://" in text else os.path.abspath(os.path.expanduser(text))


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
