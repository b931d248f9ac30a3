"""Metrics in a CSV file: one row per step, one column per metric."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import StorageError

from drivetrain.loggers.files import FileLogger, as_json, replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

METRICS = "metrics.csv"
HYPERPARAMETERS = "hparams.json"
STEP = "step"


class CSVLogger(FileLogger):
    """Writes ``metrics.csv``, and ``hparams.json`` beside it.

    A column that appears later is added to the whole file, which is then replaced at once. Files of
    an earlier fit are kept as ``metrics-1.csv``, ``metrics-2.csv`` and so on; a fit that resumes
    goes on in ``metrics.csv`` without the rows after the step that it resumes from, and so does an
    evaluation by itself.

    Args:
        save_dir: The directory; the trainer's run directory by default.
        name: How messages call it, and the folder that versions are put in.
        version: Write to ``<save_dir>/<name>/<version>`` instead.
        flush_every_n_rows: How many rows may wait in memory.
        flush_after_seconds: How long rows may wait before the next one takes them along.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str = "csv",
        version: int | str | None = None,
        *,
        flush_every_n_rows: int = 100,
        flush_after_seconds: float = 10.0,
    ) -> None:
        super().__init__(save_dir, name, version)
        self._limit = max(flush_every_n_rows, 1)
        self._patience = flush_after_seconds
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._hyperparameters: dict[str, Any] | None = None
        self._keep_until = math.inf
        self._started = False
        self._fitting = False
        self._flushed = time.monotonic()

    @property
    def path(self) -> str:
        """The file with the metrics."""
        return os.path.join(self.log_dir, METRICS)

    def prepare(self) -> None:
        """Make sure that the directory can be written. What a fit logs goes to a file of its own.

        Raises:
            StorageError: It cannot be created or written.
        """
        super().prepare()
        self.save()
        self._fitting = True
        self._started = False
        self._keep_until = -math.inf

    def continue_from(self, step: int) -> None:
        """Go on in the file that is there, without its rows after ``step``."""
        self._keep_until = step

    def log_hyperparams(self, values: Mapping[str, Any]) -> None:
        """Record hyperparameters; they are written with the first metrics."""
        if values:
            self._hyperparameters = {**(self._hyperparameters or {}), **values}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add to the row of ``step``. Written later, together with others."""
        rows = self._rows
        if rows and rows[-1][STEP] == step:
            rows[-1].update(metrics)
        else:
            if len(rows) >= self._limit or time.monotonic() - self._flushed > self._patience:
                self.save()
            rows.append({STEP: step, **metrics})
        if not self._fitting:  # an evaluation by itself: nobody is going to say that it is over
            self.save()

    def save(self) -> None:
        """Write what waits in memory.

        Raises:
            StorageError: The file cannot be written.
        """
        self._flushed = time.monotonic()
        if not self._rows and self._hyperparameters is None:
            return
        try:
            self._start()
            if self._hyperparameters is not None:
                path = os.path.join(self.log_dir, HYPERPARAMETERS)
                replace_file(path, as_json(self._hyperparameters))
                self._hyperparameters = None
            if self._rows:
                self._write(self._rows)
                self._rows.clear()
        except OSError as error:
            raise StorageError(
                f"{type(self).__name__} cannot write to {self.log_dir!r} "
                f"({error.strerror or error}).",
                "Make room or give back the permission, and resume from the last checkpoint.",
            ) from error

    def finalize(self, status: str) -> None:
        """Write what waits in memory; later metrics are appended."""
        self.save()
        self._fitting = False

    def _start(self) -> None:
        """Before the first write: go on with the files that are there, or put them aside."""
        if self._started:
            return
        os.makedirs(self.log_dir, exist_ok=True)
        if self._keep_until < 0:
            _put_aside(self.log_dir)
            self._columns = []
        else:
            self._columns, old = _read(self.path)
            old = [row for row in old if float(row[STEP]) <= self._keep_until]
            if old and self._fitting and self._rows and float(old[-1][STEP]) == self._rows[0][STEP]:
                # What an interrupted epoch still owed at its last step joins the row of that step.
                known = {name: text for name, text in old.pop().items() if text}
                self._rows[0] = {**known, **self._rows[0]}
            self._rewrite(old)
        self._started = True

    def _write(self, rows: list[dict[str, Any]]) -> None:
        known = set(self._columns)
        new = list(dict.fromkeys(key for row in rows for key in row if key not in known))
        if new:
            _, old = _read(self.path)
            self._columns += new
            self._rewrite([*old, *rows])
        else:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(_text(self._columns, rows, header=False))

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._columns:
            replace_file(self.path, _text(self._columns, rows, header=True))


def _text(columns: list[str], rows: Iterable[Mapping[str, Any]], *, header: bool) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if header:
        writer.writerow(columns)
    writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return buffer.getvalue()


def _read(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows, without a last row that was only half written when a process died."""
    if not os.path.exists(path):
        return [], []
    with open(path, encoding="utf-8", newline="") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    reader = csv.DictReader(lines)
    return list(reader.fieldnames or []), list(reader)


def _put_aside(directory: str) -> None:
    """Give the files of an earlier run the first number that neither of them has."""
    present = [name for name in (METRICS, HYPERPARAMETERS) if _there(directory, name)]
    number = 1
    while any(_there(directory, _numbered(name, number)) for name in (METRICS, HYPERPARAMETERS)):
        number += 1
    for name in present:
        os.replace(os.path.join(directory, name), os.path.join(directory, _numbered(name, number)))


def _there(directory: str, name: str) -> bool:
    return os.path.lexists(os.path.join(directory, name))


def _numbered(name: str, number: int) -> str:
    stem, extension = os.path.splitext(name)
    return f"{stem}-{number}{extension}"
