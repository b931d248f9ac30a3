"""Drivetrain: a PyTorch trainer in which hardware is a package.

Names are imported when they are first used, so that a command that needs no torch starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain.callbacks.base import Callback as Callback
    from drivetrain.datamodule import DataModule as DataModule
    from drivetrain.module import FunctionalModule as FunctionalModule
    from drivetrain.module import Module as Module
    from drivetrain.runtime import Runtime as Runtime
    from drivetrain.seeding import seed_everything as seed_everything
    from drivetrain.signals import Interrupted as Interrupted
    from drivetrain.signals import SignalPolicy as SignalPolicy
    from drivetrain.trainer import Trainer as Trainer

_HOME = {
    "Callback": "callbacks.base",
    "DataModule": "datamodule",
    "FunctionalModule": "module",
    "Interrupted": "signals",
    "Module": "module",
    "Runtime": "runtime",
    "SignalPolicy": "signals",
    "Trainer": "trainer",
    "seed_everything": "seeding",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - a test compares it with the imports above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
