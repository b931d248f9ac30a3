"""Lists of hosts as managers write them, and a port that all ranks derive from the same facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

# Below the range from which Linux takes ports for outgoing connections (32768), above the usual
# services. Steps of one job are 997 apart, so that they meet those of no job with a close number.
_FIRST_PORT: Final = 10000
_PORTS: Final = 20000
_BETWEEN_STEPS: Final = 997


def expand_hosts(text: str) -> tuple[str, ...]:
    """Every host of a list such as ``node[01-03,07],gpu-a1``, in order.

    Several brackets in one name make a product, the last of them counting fastest. Numbers keep
    the width that they are written with.

    Raises:
        ValueError: Brackets that do not match, or a range that is none.
    """
    hosts: list[str] = []
    for item in _items(text):
        names = [""]
        for part, bracketed in _parts(item):
            ends = tuple(_numbers(part)) if bracketed else (part,)
            names = [name + end for name in names for end in ends]
        hosts.extend(names)
    return tuple(hosts)


def first_host(text: str) -> str:
    """The first host of a list. Raises ``ValueError`` where there is none."""
    hosts = expand_hosts(text)
    if not hosts:
        raise ValueError(f"{text!r} names no host")
    return hosts[0]


def expand_counts(text: str) -> tuple[int, ...]:
    """The numbers in a list such as ``2(x3),1``: ``(2, 2, 2, 1)``.

    Raises:
        ValueError: It is no such list.
    """
    counts: list[int] = []
    for item in text.split(","):
        number, _, times = item.strip().partition("(x")
        if times and not times.endswith(")"):
            raise ValueError(f"{item!r} in {text!r} is no number of tasks")
        counts += [_number(number)] * (_number(times[:-1]) if times else 1)
    return tuple(counts)


def port_of(job: int, step: int = 0, restart: int = 0) -> int:
    """A port for a step of a job, the same in all its ranks.

    Two jobs whose numbers differ by less than 900 never get the same, so jobs that share a machine
    do not meet; nor do 16 steps of one. A later start of the same job gets another port.
    """
    return _FIRST_PORT + (job + _BETWEEN_STEPS * step + 7 * _BETWEEN_STEPS * restart) % _PORTS


def same_host(one: str, other: str) -> bool:
    """Whether two names can be those of one host: equal, or equal up to the domain."""
    if "." in one and "." in other:
        return one == other
    return one.partition(".")[0] == other.partition(".")[0]


def _items(text: str) -> Iterator[str]:
    """The items between commas that are in no bracket."""
    depth, start = 0, 0
    for index, letter in enumerate(f"{text},"):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            item = text[start:index].strip()
            start = index + 1
            if item:
                yield item
    if depth:
        raise ValueError(f"the brackets in {text!r} do not match")


def _parts(item: str) -> Iterator[tuple[str, bool]]:
    """The plain and the bracketed parts of one item."""
    while item:
        plain, opened, rest = item.partition("[")
        inside, _, item = rest.partition("]")
        if plain:
            yield plain, False
        if opened:
            yield inside, True


def _numbers(text: str) -> Iterator[str]:
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        low = _number(first)
        high = _number(last) if dash else low
        if high < low:
            raise ValueError(f"the range {item!r} ends before it begins")
        for number in range(low, high + 1):
            yield str(number).zfill(len(first))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no whole number")
    return int(text)
