"""JSON of anybody: what its values would take in memory is known before they are made.

Python takes up to thirty times as many bytes for them as the text has: an empty list has 64, and
two in the text. So whatever may become a value is counted first, by the signs that it cannot do
without, and a text that would take too much is not parsed. The writers count too: what nobody would
read is refused when it is saved.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What the values of any text may take, in bytes, however small its files are.
ROOM: Final = 1 << 26

# At most how many bytes a value takes for each sign of its text, in CPython on 64 bits: with the
# spare room that containers have while they grow, and what the parser keeps until it is done.
_COSTS: Final = {b"[": 96, b"{": 72, b",": 44, b":": 208, b'"': 28}
# And when codecs make another tree of the first.
_DECODED: Final = {b"[": 96, b"{": 72, b",": 32, b":": 208}
# Hashing is not for free: each item of a set may have room for several.
_HASHED: Final = (b'set"', b"\\u")
_OF_A_SET: Final = 100
_WIDE: Final = 4  # bytes per character, where one is outside of Unicode's first plane


class TooMuchError(ValueError):
    """Says in its text what a text would take."""


def parse_json(text: bytes | bytearray, others: int = 0, *, decoded: bool = False) -> Any:
    """The values of JSON as the standard has it: no NaN, and no name twice.

    Args:
        text: UTF-8. A ``bytearray`` is empty afterwards, since it would be memory for nothing.
        others: As for ``cost_problem``.
        decoded: As for ``cost_problem``.

    Raises:
        ValueError: It is not JSON, or its values would take too much memory.
    """
    if how := cost_problem(text, others, decoded=decoded):
        raise TooMuchError(how)
    characters = text.decode("utf-8")
    if isinstance(text, bytearray):
        text.clear()
    return json.loads(characters, object_pairs_hook=_once, parse_constant=_no_constant)


def cost_problem(text: bytes | bytearray, others: int, *, decoded: bool = False) -> str:
    """Why a text is too much for a reader's memory; empty if it is not.

    Its values may take as many bytes as it has itself, a quarter of what the other files have, and
    ``ROOM``: with three such texts, and what tensors take, that is twice the size of all.

    Args:
        text: Is looked at, not parsed.
        others: Bytes of everything that is read besides.
        decoded: Whether codecs make another tree of the first.
    """
    cost = cost_of(text, decoded=decoded)
    allowed = len(text) + others // 4 + ROOM
    if cost <= allowed:
        return ""
    return f"its values might take {cost} bytes of memory, more than the {allowed} that they may"


def cost_of(text: bytes | bytearray, *, decoded: bool = False) -> int:
    """At most how many bytes a text and its values take. Arguments are as for ``cost_problem``."""
    cost = sum(text.count(sign) * each for sign, each in _COSTS.items())
    wide = 1 if text.isascii() and b"\\u" not in text else _WIDE
    # The characters, the values made of them, and pieces of those where something is escaped.
    cost += len(text) * wide * (3 if b"\\" in text else 2)
    if decoded:
        cost += sum(text.count(sign) * each for sign, each in _DECODED.items()) + len(text)
        if any(sign in text for sign in _HASHED):
            cost += text.count(b",") * _OF_A_SET
    return cost


class BadJSONError(ValueError):
    """Says in its text what the standard does not allow."""


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadJSONError("a name is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise BadJSONError(f"{text} is not JSON")
