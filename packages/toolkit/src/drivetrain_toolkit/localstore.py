"""Checkpoints on a local or mounted file system."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit import durable
from drivetrain_toolkit.manifest import MANIFEST, damaged

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Mapping

    from drivetrain_toolkit.stores import Fill

_SINGLE_FILES: Final = (b"PK\x03\x04", b"\x80")  # torch.save: a zip archive; before 1.6 a pickle
_NOTE: Final = "note-"
# O_NONBLOCK: a pipe in place of a file must not keep a reader waiting before it is refused.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class LocalSource:
    """A directory by its handle, so that it stays the same one if its name goes to another."""

    exact = True

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            self.files: Mapping[str, int] = self._sizes()
        except BaseException:
            self.close()
            raise

    def _sizes(self) -> dict[str, int]:
        """Sizes by name. Anything but a plain file is refused, links to elsewhere included."""
        found: dict[str, int] = {}
        with os.scandir(self._handle) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(facts.st_mode):
                    raise damaged(self.path, entry.name, "it is not a plain file")
                found[entry.name] = facts.st_size
        return found

    @contextmanager
    def open(self, name: str) -> Iterator[io.FileIO]:
        """A file of it, never what a link in its place leads to."""
        handle = os.open(name, _READ, dir_fd=self._handle)
        with open(handle, "rb", buffering=0) as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != self.files[name]:
                raise damaged(self.path, name, "it has changed meanwhile")
            yield file

    def replaced(self) -> bool:
        """Whether the name belongs to another directory by now."""
        try:
            now, then = os.stat(self.path), os.fstat(self._handle)
        except FileNotFoundError:
            return True
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)

    def close(self) -> None:
        """Close the handle."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()


class LocalDraft:
    """A hidden directory beside the one that it is going to be."""

    longest_nap = 0.05

    def __init__(self, folder: str, path: str) -> None:
        self._folder = folder
        self._path = path

    def name(self, wanted: str) -> str:
        """As wanted: a new directory has no other files."""
        return wanted

    def write(self, name: str, fill: Fill, size: int = 0) -> tuple[int, str]:
        """Write a file; return once it is on the disk."""
        return durable.write_file(os.path.join(self._folder, name), fill, size)

    def publish(self, manifest: bytes) -> None:
        """Everything to the disk, then the manifest, then the name."""
        for name in os.listdir(self._folder):
            if name.startswith(_NOTE):
                os.unlink(os.path.join(self._folder, name))
        durable.sync_directory(self._folder)  # before the manifest, which vouches for the others
        self.write(MANIFEST, lambda write: write(manifest))
        durable.sync_directory(self._folder)
        durable.publish(self._folder, self._path)

    def abandon(self) -> None:
        """Delete it, as far as that is possible."""
        with suppress(OSError):  # the error that led here is the one to show
            durable.discard(self._folder)

    def tell(self, name: str, data: bytes) -> None:
        """Write under a hidden name, and rename."""
        hidden = os.path.join(self._folder, f".{name}")
        with open(hidden, "wb") as file:
            file.write(data)
        os.rename(hidden, os.path.join(self._folder, _NOTE + name))

    def notes(self) -> Mapping[str, int]:
        """What is there by now; nothing once it is published or abandoned."""
        found: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    found[entry.name.removeprefix(_NOTE)] = entry.stat().st_size
        return found

    def note(self, name: str) -> bytes:
        """What a note says."""
        with open(os.path.join(self._folder, _NOTE + name), "rb") as file:
            return file.read()


class LocalStore:
    """Directories that appear, are replaced and disappear in one step."""

    def open(self, path: str) -> LocalSource:
        """The directory, or the one that a killed process put aside."""
        return LocalSource(_located(_full(path)))

    def begin(self, path: str, token: str) -> LocalDraft:
        """Make the directory above if need be, tidy up what killed processes left, and begin."""
        path = _full(path)
        durable.make_directories(os.path.dirname(path))
        _refuse_to_replace(path)
        durable.sweep(path)
        folder = durable.hidden_sibling(path, token)
        os.mkdir(folder)
        return LocalDraft(folder, path)

    def join(self, path: str, token: str) -> LocalDraft | None:
        """Look for the draft with that token."""
        path = _full(path)
        folder = durable.hidden_with_token(path, token)
        return None if folder is None else LocalDraft(folder, path)

    def remove(self, path: str) -> None:
        """First from view, in one step, then from the disk."""
        path = _full(path)
        _refuse_to_replace(path)
        for name in (path, durable.replaced_name(path)):
            durable.withdraw(name)

    def candidates(self, directory: str) -> list[str]:
        """Directories, and those that a killed process put aside, by the name they stand for."""
        directory = _full(directory)
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
        paths = (_visible(os.path.join(directory, name)) for name in names)
        return sorted({path for path in paths if path is not None})


def _full(path: Any) -> str:
    return str(os.path.abspath(os.path.expanduser(os.fspath(path))))


def _located(path: str) -> str:
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
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _not_a_directory(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(_SINGLE_FILES):
        raise CheckpointError(
            f"A checkpoint was to be read from {path!r}, which is a single file as torch.save "
            "writes it.",
            "Convert it to a checkpoint of this format first: drivetrain checkpoint convert.",
        )
    raise _not_a_directory(path)


def _not_a_directory(path: str) -> CheckpointError:
    return CheckpointError(
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
