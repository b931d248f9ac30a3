"""Pickling what crosses to a started process, with errors that say what does not cross.

Plain pickle on purpose: the one of ``torch.multiprocessing`` puts tensors into shared memory, which
is gone when the process that holds it ends, and runs out of file descriptors.
"""

from __future__ import annotations

import io
import pickle
import sys
from importlib import import_module
from types import FunctionType
from typing import Any

from drivetrain_interfaces.errors import NotFoundError, UserCodeError


class _Pickler(pickle.Pickler):
    """Also notes what was defined in a ``__main__`` that no other process can import."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.at_the_prompt: set[str] = set()

    def reducer_override(self, value: Any) -> Any:
        """Look at functions and classes; pickle everything as usual."""
        if isinstance(value, (type, FunctionType)) and value.__module__ == "__main__":
            self.at_the_prompt.add(value.__qualname__)
        return NotImplemented


def pickled(main: Any, launcher: str = "spawn") -> bytes:
    """``main`` for a fresh interpreter, which imports what it needs by name.

    Raises:
        UserCodeError: It, or something it holds, cannot be pickled, or could not be found there.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    asked = f"The {launcher!r} launcher was to send {_name(main)} to new processes"
    try:
        pickler.dump(main)
    except Exception as error:
        raise UserCodeError(
            f"{asked}, and it cannot be pickled: {type(error).__name__}: {error}.",
            "Keep what cannot be pickled out of the objects that are passed, define functions and "
            "classes at the top of a module, or choose launcher='fork' or 'script'.",
        ) from error
    if pickler.at_the_prompt and not _main_is_a_file():
        names = ", ".join(sorted(pickler.at_the_prompt))
        raise UserCodeError(
            f"{asked}, and they cannot import {names}, defined at a prompt or in a notebook.",
            "Move the definitions into a module, or choose launcher='fork' or 'notebook'.",
        )
    return file.getvalue()


def pickled_by_value(main: Any, launcher: str) -> bytes:
    """``main`` with everything that was defined at the prompt or in the script itself.

    Raises:
        NotFoundError: cloudpickle, which does it, is not installed.
        UserCodeError: It, or something it holds, cannot be pickled.
    """
    cloudpickle = need_cloudpickle(launcher)
    try:
        data: bytes = cloudpickle.dumps(main)
    except Exception as error:
        raise UserCodeError(
            f"The {launcher!r} launcher was to send {_name(main)} to new processes, and it cannot "
            f"be pickled: {type(error).__name__}: {error}.",
            "Keep what cannot be pickled, such as open files and locks, out of the objects that "
            "are passed.",
        ) from error
    return data


def need_cloudpickle(launcher: str) -> Any:
    """The module ``cloudpickle``. Raises ``NotFoundError`` where it is not installed."""
    try:
        return import_module("cloudpickle")
    except ModuleNotFoundError as error:
        raise NotFoundError(
            f"The {launcher!r} launcher was asked for, and it needs cloudpickle, which is not "
            "installed.",
            "Install drivetrain-toolkit[remote].",
        ) from error


def pickled_result(result: Any, *, by_value: bool = False) -> bytes:
    """What rank 0 returned; ``by_value`` with classes that were sent that way.

    Raises:
        UserCodeError: It cannot be pickled.
    """
    try:
        if by_value:
            data: bytes = import_module("cloudpickle").dumps(result)
            return data
        return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise UserCodeError(
            f"Rank 0 was to send its result, a {type(result).__name__}, to the process that "
            f"launched it, and it cannot be pickled: {type(error).__name__}: {error}.",
            "Return plain values and tensors.",
        ) from error


def unpickled(data: bytes, what: str) -> Any:
    """The object again. ``data`` comes from a process of this run, never from a file.

    Raises:
        UserCodeError: Something that it names cannot be imported here.
    """
    try:
        return pickle.loads(data)  # noqa: S301 - from our own parent or child
    except Exception as error:
        raise UserCodeError(
            f"{what} arrived and cannot be restored: {type(error).__name__}: {error}.",
            "Define functions and classes at the top of a module that every process can import.",
        ) from error


def _main_is_a_file() -> bool:
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is not None or hasattr(main, "__file__")


def _name(value: Any) -> str:
    return repr(getattr(value, "__qualname__", None) or type(value).__name__)
