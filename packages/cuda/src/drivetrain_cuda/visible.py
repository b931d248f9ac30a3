"""Which devices a process may use, by ``CUDA_VISIBLE_DEVICES``. Pure; the driver is not asked.

The rules are those of the driver: https://docs.nvidia.com/cuda/cuda-c-programming-guide, chapter
"CUDA Environment Variables", and for compute instances the guide to Multi-Instance GPU, "CUDA
Device Enumeration".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: How the driver spells what it can be asked for by name.
GPU_PREFIX, MIG_PREFIX = "GPU-", "MIG-"


@dataclass(frozen=True, slots=True)
class Card:
    """One board as the driver lists it, in the order of the PCI bus.

    Attributes:
        name: The model.
        uuid: Its name for life, ``"GPU-…"``.
        capability: The compute capability, such as ``(9, 0)``; None if it was not told.
        bus: The PCI address, such as ``"00000000:3B:00.0"``.
        memory: Bytes of memory.
        partitioned: Whether it is in MIG mode, in which only its compute instances can be used.
        instances: UUIDs of these, ``"MIG-…"``.
    """

    name: str
    uuid: str
    capability: tuple[int, int] | None = None
    bus: str = ""
    memory: int = 0
    partitioned: bool = False
    instances: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Visible:
    """What a process sees.

    Attributes:
        names: A name for each device, in the order of their indices; what follows the last space
            is a UUID, where it is known which device it belongs to.
        stopped_at: The entry of the variable at which the driver stopped reading; None if it read
            all of them.
        why: Why it stopped there, or why nothing is left.
    """

    names: tuple[str, ...]
    stopped_at: str | None = None
    why: str = ""


def entries(variable: str) -> tuple[str, ...] | tuple[int, ...]:
    """The entries that the driver reads: numbers, or names that all begin alike.

    Reading ends at the first entry that is neither. An entry that comes twice empties the list.

    Args:
        variable: The text of ``CUDA_VISIBLE_DEVICES``.
    """
    for prefix in (GPU_PREFIX, MIG_PREFIX):
        if variable.startswith(prefix):
            return _named(variable, prefix)
    numbers: list[int] = []
    for item in variable.split(","):
        number = _leading_number(item.strip())
        if number in numbers:
            return ()
        if number < 0:
            break
        numbers.append(number)
    return tuple(numbers)


def _named(variable: str, prefix: str) -> tuple[str, ...]:
    names: list[str] = []
    for item in variable.split(","):
        if item in names:
            return ()
        if not item.startswith(prefix):
            break
        names.append(item)
    return tuple(names)


def _leading_number(text: str) -> int:
    """What C's ``strtoul`` makes of it, so that ``"1gpu"`` is 1; -1 for what begins otherwise."""
    end = 1 if text[:1] in {"+", "-"} else 0
    start = end
    while end < len(text) and text[end] in "0123456789":
        end += 1
    return int(text[:end]) if end > start else -1


def visible(cards: Sequence[Card], variable: str | None, order: str | None = None) -> Visible:
    """The devices that a process sees, in the order of their indices.

    Args:
        cards: All boards of the machine.
        variable: The text of ``CUDA_VISIBLE_DEVICES``; None if it is not set.
        order: The text of ``CUDA_DEVICE_ORDER``; None if it is not set.
    """
    if variable is None:
        return _enumerated([_device(card) for card in cards], _order_known(cards, order))
    asked = entries(variable)
    if not asked:
        return Visible((), variable.split(",", maxsplit=1)[0], _why_empty(variable))
    if isinstance(asked[0], int):
        return _by_number(cards, variable, order)
    return _by_name(cards, variable)


def _why_empty(variable: str) -> str:
    if not variable.strip():
        return "it is empty, which hides all devices"
    first = variable.split(",", maxsplit=1)[0].strip()
    items = [item.strip() for item in variable.split(",")]
    if len(set(items)) < len(items):
        return "it names a device twice, which hides all devices"
    return f"{first!r} is no device, and what follows it is not read"


def _by_number(cards: Sequence[Card], variable: str, order: str | None) -> Visible:
    numbers = [item for item in entries(variable) if isinstance(item, int)]
    given = variable.split(",")
    found: list[tuple[str, bool]] = []
    stopped, why = None, ""
    for number in numbers:
        if number >= len(cards):
            stopped = str(number)
            why = f"there are {len(cards)} devices, and numbers begin at 0"
            break
        found.append(_device(cards[number]))
    if stopped is None and len(numbers) < len(given):
        stopped = given[len(numbers)].strip()
        why = f"{stopped!r} is no number"
    seen = _enumerated(found, _order_known(cards, order))
    return Visible(seen.names, stopped, why or seen.why)


def _by_name(cards: Sequence[Card], variable: str) -> Visible:
    asked = [item for item in entries(variable) if isinstance(item, str)]
    given = variable.split(",")
    known = {card.uuid: _device(card) for card in cards}
    known |= {
        instance: (f"{card.name} {instance}", True) for card in cards for instance in card.instances
    }
    found: list[str] = []
    stopped, why = None, ""
    for item in asked:
        matches = [uuid for uuid in known if uuid.startswith(item)]
        if len(matches) != 1:
            stopped = item
            why = f"{item!r} begins the name of {len(matches) or 'no'} devices"
            break
        if matches[0] in found:
            return Visible((), item, "it names a device twice, which hides all devices")
        found.append(matches[0])
    if stopped is None and len(asked) < len(given):
        stopped = given[len(asked)]
        why = f"{stopped!r} begins otherwise than the first"
    seen = _enumerated([known[uuid] for uuid in found], order_known=True)
    return Visible(seen.names, stopped, why or seen.why)


def _device(card: Card) -> tuple[str, bool]:
    """Its name, and whether it is a compute instance. An empty name: nothing can be used of it."""
    if not card.partitioned:
        return f"{card.name} {card.uuid}", False
    if not card.instances:
        return "", True
    return f"{card.name} {card.instances[0]}", True


def _enumerated(devices: Sequence[tuple[str, bool]], order_known: bool) -> Visible:  # noqa: FBT001 - private
    """A process can use one compute instance, and then no whole board beside it."""
    instances = [name for name, instance in devices if instance and name]
    if instances:
        return Visible((instances[0],))
    whole = [name for name, instance in devices if not instance]
    if not whole and devices:
        return Visible((), None, "the device is in MIG mode and has no compute instance")
    if not order_known:  # then it is not known which number a UUID has
        whole = [name.rpartition(" ")[0] for name in whole]
    return Visible(tuple(whole))


def _order_known(cards: Sequence[Card], order: str | None) -> bool:
    """Whether numbers follow the PCI bus. If not, the driver puts the fastest first."""
    return order == "PCI_BUS_ID" or len({card.name for card in cards}) < 2  # noqa: PLR2004
