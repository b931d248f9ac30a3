"""What a Trainer adds by itself: nothing that writes a file unless there is a place for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks.base import Callback
from drivetrain.loggers.base import Logger

if TYPE_CHECKING:
    from collections.abc import Sequence


def default_callbacks(
    given: Sequence[Any],
    *,
    checkpointing: bool,
    progress_bar: bool,
    model_summary: bool,
    no_files: bool,
) -> list[Callback]:
    """The user's callbacks, and those that the settings add if the user gave none of the kind."""
    from drivetrain.callbacks.checkpoint import ModelCheckpoint
    from drivetrain.callbacks.model_summary import ModelSummary
    from drivetrain.callbacks.progress import ProgressBar

    for each in given:
        if not isinstance(each, Callback):
            raise ConfigurationError(
                f"callbacks contains a {type(each).__name__}.", "Subclass drivetrain.Callback."
            )
    callbacks: list[Callback] = list(given)

    def has(kind: type) -> bool:
        return any(isinstance(each, kind) for each in callbacks)

    if progress_bar and not has(ProgressBar):
        callbacks.append(ProgressBar())
    if model_summary and not has(ModelSummary):
        callbacks.append(ModelSummary())
    if no_files:
        return [each for each in callbacks if not each.saves_checkpoints]
    if checkpointing and not any(each.saves_checkpoints for each in callbacks):
        callbacks.append(ModelCheckpoint())
    return callbacks


def default_loggers(given: Any, run_dir: str, *, by_default: bool, off: bool) -> list[Logger]:
    """The user's loggers, or CSV files in the run directory if there is one."""
    if off or given is False:
        return []
    if given is None or given is True:
        if not (by_default or given):
            return []
        from drivetrain.loggers.csv import CSVLogger

        return [CSVLogger(run_dir)]
    loggers = list(given) if isinstance(given, (list, tuple)) else [given]
    for each in loggers:
        if not isinstance(each, Logger):
            raise ConfigurationError(
                f"logger contains a {type(each).__name__}.", "Subclass drivetrain.loggers.Logger."
            )
    return loggers
