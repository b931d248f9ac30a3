"""What loggers that write files have in common: where they write, and from which step on."""

from __future__ import annotations

import json
import os
import tempfile
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import StorageError

from drivetrain.loggers.base import Logger

if TYPE_CHECKING:
    from collections.abc import Mapping


def ensure_writable(directory: str, owner: str) -> None:
    """Create a directory if need be, and write a real file into it, which is removed again.

    Raises:
        StorageError: That did not work; ``owner`` is who wanted it.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-") as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as error:
        raise StorageError(
            f"{owner} cannot write to {directory!r} ({error.strerror or error}).",
            "Choose a directory that this user can create and write.",
        ) from error


def replace_file(path: str, text: str) -> None:
    """Write a text file so that it is there completely or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def as_json(values: Mapping[str, Any]) -> str:
    """Values as JSON for people to read; what JSON cannot hold becomes its ``repr``."""
    return json.dumps(dict(values), indent=2, default=repr, sort_keys=True) + "\n"


class FileLogger(Logger):
    """A logger with a directory.

    The trainer calls ``use_run_dir`` before ``prepare``, and ``continue_from`` before the first
    metrics of a run that resumes.

    Args:
        save_dir: The directory; the trainer's run directory by default.
        name: How messages call it, and the folder that versions are put in.
        version: Write to ``<save_dir>/<name>/<version>`` instead; a number ``n`` becomes
            ``version_n``.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str = "",
        version: int | str | None = None,
    ) -> None:
        self._save_dir = None if save_dir is None else os.path.abspath(os.fspath(save_dir))
        self._name = name
        self._version = f"version_{version}" if isinstance(version, int) else version

    @property
    def name(self) -> str:
        """How messages call it."""
        return self._name

    @property
    def version(self) -> str | None:
        """The folder of this run's version, if it was asked for."""
        return self._version

    @property
    def log_dir(self) -> str:
        """Where files go."""
        base = self._save_dir or os.getcwd()
        return os.path.join(base, self._name, self._version) if self._version else base

    def use_run_dir(self, run_dir: str) -> None:
        """Write to the trainer's run directory, unless another one was given."""
        if self._save_dir is None:
            self._save_dir = os.path.abspath(run_dir)

    def continue_from(self, step: int) -> None:
        """The run resumes at ``step``: what was logged after it is about to be logged again."""

    def prepare(self) -> None:
        """Make sure that the directory can be written.

        Raises:
            StorageError: It cannot be created or written.
        """
        ensure_writable(self.log_dir, type(self).__name__)
