"""Questions to the driver through ``pyhlml``, which opens no device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

#: A process that opened a module holds nearly all of its memory, from its start to its end.
_BUSY_ABOVE = 0.5


class NoAnswer(Exception):  # noqa: N818 - it ends a question, not a program
    """The driver cannot be asked this way; the text says why."""


@dataclass(frozen=True, slots=True)
class Card:
    """One Gaudi module.

    Attributes:
        module: Its number, as in ``HABANA_VISIBLE_MODULES``.
        name: Of the model.
        busy: Whether a process holds it.
    """

    module: int
    name: str
    busy: bool


def ask() -> tuple[Card, ...]:
    """The modules of this machine, by their numbers.

    Raises:
        NoAnswer: ``pyhlml`` or the vendor's library behind it is missing, or it fails.
    """
    try:
        pyhlml: Any = import_module("pyhlml")
        pyhlml.hlmlInit()
    except ImportError as error:
        raise NoAnswer("pyhlml is not installed") from error
    except Exception as error:
        # Errors of the vendor's library are classes of its own, and some are none of RuntimeError.
        raise NoAnswer(f"pyhlml does not start: {type(error).__name__}: {error}") from error
    try:
        cards = [_card(pyhlml, index) for index in range(pyhlml.hlmlDeviceGetCount())]
    except Exception as error:
        raise NoAnswer(f"pyhlml does not answer: {type(error).__name__}: {error}") from error
    finally:
        pyhlml.hlmlShutdown()
    return tuple(sorted(cards, key=lambda card: card.module))


def _card(pyhlml: Any, index: int) -> Card:
    handle = pyhlml.hlmlDeviceGetHandleByIndex(index)
    memory = pyhlml.hlmlDeviceGetMemoryInfo(handle)
    return Card(
        module=int(pyhlml.hlmlDeviceGetModuleID(handle)),
        name=bytes(pyhlml.hlmlDeviceGetName(handle)).decode(errors="replace"),
        busy=memory.used > _BUSY_ABOVE * memory.total,
    )
