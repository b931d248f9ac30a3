"""Loggers. Names are re-exported lazily, so that a run pays only for those it uses."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain.loggers.base import Logger as Logger
    from drivetrain.loggers.csv import CSVLogger as CSVLogger
    from drivetrain.loggers.files import FileLogger as FileLogger
    from drivetrain.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger

_HOME = {
    "CSVLogger": "csv",
    "FileLogger": "files",
    "Logger": "base",
    "TensorBoardLogger": "tensorboard",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - a test compares it with the imports above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
