"""Callbacks. Names are re-exported lazily, so that a run pays only for those it uses."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain.callbacks.base import Callback as Callback
    from drivetrain.callbacks.base import Moment as Moment
    from drivetrain.callbacks.checkpoint import ModelCheckpoint as ModelCheckpoint
    from drivetrain.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from drivetrain.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
    from drivetrain.callbacks.model_summary import ModelSummary as ModelSummary
    from drivetrain.callbacks.progress import ProgressBar as ProgressBar
    from drivetrain.callbacks.timer import Timer as Timer

_HOME = {
    "Callback": "base",
    "EarlyStopping": "early_stopping",
    "LearningRateMonitor": "lr_monitor",
    "ModelCheckpoint": "checkpoint",
    "ModelSummary": "model_summary",
    "Moment": "base",
    "ProgressBar": "progress",
    "Timer": "timer",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - a test compares it with the imports above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
