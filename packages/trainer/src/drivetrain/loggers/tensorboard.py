"""Metrics in TensorBoard's event files. The package is imported when the first event is written."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import NotFoundError

from drivetrain.loggers.files import FileLogger, as_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(FileLogger):
    """Writes event files that ``tensorboard --logdir`` shows.

    Several runs may share a directory, since every event file has a name of its own; a run that
    resumes tells TensorBoard to drop what was logged after the step that it resumes from.

    Args:
        save_dir: The directory; the trainer's run directory by default.
        name: The folder in it.
        version: A folder in that, if wanted; a number ``n`` becomes ``version_n``.
        flush_secs: How long events may wait in memory.

    Raises:
        NotFoundError: The package tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str = "tensorboard",
        version: int | str | None = None,
        *,
        flush_secs: int = 30,
    ) -> None:
        super().__init__(save_dir, name, version)
        if find_spec("tensorboard") is None:
            raise NotFoundError(
                f"{type(self).__name__} needs the package tensorboard, which is not installed.",
                'Install it with pip install "drivetrain[tensorboard]".',
            )
        self._flush_secs = flush_secs
        self._resumed_step: int | None = None
        self._writer: SummaryWriter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}  # each process opens its own

    @property
    def log_dir(self) -> str:
        """Where files go."""
        base = os.path.join(self._save_dir or os.getcwd(), self._name)
        return os.path.join(base, self._version) if self._version else base

    @property
    def experiment(self) -> SummaryWriter:
        """The writer, for images, histograms and the like. Use it on rank 0."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._resumed_step is None else self._resumed_step + 1
            self._resumed_step = None
            self._writer = SummaryWriter(
                self.log_dir, purge_step=purge, flush_secs=self._flush_secs
            )
        return self._writer

    def continue_from(self, step: int) -> None:
        """Hide what was logged after ``step``."""
        self.finalize("success")
        self._resumed_step = step

    def log_hyperparams(self, values: Mapping[str, Any]) -> None:
        """Record hyperparameters as a text."""
        if not values:
            return
        text = "```json\n" + as_json(values) + "```"
        self.experiment.add_text("hyperparameters", text)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step."""
        writer = self.experiment
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Write what waits in memory."""
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Write and close; a later event opens a new file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
