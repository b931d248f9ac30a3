"""Loggers: where metrics go. Called on rank 0 and only at log points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Logger:
    """Base class of loggers; the methods that write must be overridden."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return type(self).__name__

    def use_run_dir(self, run_dir: str) -> None:
        """Write to the trainer's run directory, unless another one was given. On rank 0."""

    def continue_from(self, step: int) -> None:
        """The run resumes at ``step``: what was logged after it is about to be logged again."""

    def prepare(self) -> None:
        """Make sure that it can write. On rank 0 before training; raises ``StorageError``."""

    def log_hyperparams(self, values: Mapping[str, Any]) -> None:
        """Record hyperparameters of the run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step. May buffer."""
        raise NotImplementedError

    def save(self) -> None:
        """Write what is buffered."""

    def finalize(self, status: str) -> None:
        """The run ended: ``"success"``, ``"interrupted"`` or ``"failed"``. Write and close."""
        self.save()
