"""Logged values: kept on the device until a log point, then reduced over ranks all at once.

``log`` is on the hot path: it stores a detached tensor and returns. A log point stacks what was
stored, reads it back with one host synchronization, and, with several ranks, exchanges it in one
collective.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from drivetrain_interfaces import ConfigurationError, UserCodeError

from drivetrain.batches import size_of
from drivetrain.exchange import gather_numbers, gather_objects

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_interfaces import Collectives, World

_FOLD_AT = 64
_REDUCTIONS = {"mean", "sum", "min", "max"}


class Options(NamedTuple):
    """How one name is logged; fixed by the first call of a phase."""

    prog_bar: bool = False
    logger: bool = True
    on_step: bool | None = None
    on_epoch: bool | None = None
    reduce_fx: str | Callable[..., Any] = "mean"
    sync_dist: bool | None = None


@dataclass(slots=True)
class Logged:
    """Host values of one log point, by who wants them."""

    everything: dict[str, float] = field(default_factory=dict)
    logger: dict[str, float] = field(default_factory=dict)
    prog_bar: dict[str, float] = field(default_factory=dict)


class _Row(NamedTuple):
    """What ranks tell each other about one name."""

    name: str
    reduction: str
    total: float
    weight: float
    on_step: bool
    shown: tuple[Any, ...]


class _Slot:
    """One name: its options, the newest value, and what an epoch has added up."""

    __slots__ = (
        "adopted",
        "asked",
        "fresh",
        "last",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "partials",
        "pending",
        "reduction",
        "values",
        "weight",
        "weights",
    )

    def __init__(self, name: str, asked: Options, *, on_step: bool, on_epoch: bool) -> None:
        self.name = name
        self.asked = asked
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.reduction = _reduction(asked.reduce_fx, name)
        #: Whether another rank or a checkpoint named it; the first call here settles the options.
        self.adopted = False
        self.last: Any = None
        self.fresh = False
        self.pending = False
        self.metric: Any = None  # an object with compute() and reset(), such as a torchmetrics one
        self.clear()

    def clear(self) -> None:
        self.values: list[Any] = []
        self.weights: list[float] = []
        self.partials: list[Any] = []
        self.weight = 0.0

    def continue_from(self, other: _Slot) -> None:
        """Go on with what ``other`` has added up, if it means the same."""
        if self.on_epoch and self.reduction == other.reduction:
            self.values, self.weights = other.values, other.weights
            self.partials, self.weight = other.partials, other.weight

    def add(self, other: _Slot) -> None:
        """Take what ``other`` has added up as well."""
        self.values += other.values
        self.weights += other.weights
        self.partials += other.partials
        self.weight += other.weight

    def fold(self) -> None:
        """Add up pending values on their device; no host synchronization."""
        if not self.values:
            return
        on_host = all(not isinstance(value, torch.Tensor) for value in self.values)
        fold = _fold_host if on_host else _fold_device
        try:
            self.partials.append(fold(self.values, self.weights, self.reduction))
        except (TypeError, ValueError, RuntimeError) as error:
            # Only the first value is looked at when it is logged, as that would cost every step.
            wrong = [value for value in self.values if not _is_single(value)]
            if not wrong:
                raise
            raise _unusable(self.name, wrong[0]) from error
        self.weight += sum(self.weights)
        self.values, self.weights = [], []

    def total(self) -> float:
        """The epoch's sum, weighted sum or extreme, on the host and in double precision."""
        self.fold()
        parts = _to_host(self.partials)
        self.partials = list(parts)
        if not parts:
            return {"min": math.inf, "max": -math.inf}.get(self.reduction, 0.0)
        return {"min": min, "max": max}.get(self.reduction, math.fsum)(parts)


class Metrics:
    """What a phase (training, or one evaluation) has logged.

    Attributes:
        batch: The batch in hand; its size weights what is logged for the epoch.
        suffix: Appended to names, to tell several loaders apart.
        between_batches: Whether an epoch-end hook is running, which logs for the epoch by default.
    """

    def __init__(
        self, collectives: Collectives, world: World, device: torch.device, *, training: bool
    ) -> None:
        self.batch: Any = None
        self.suffix = ""
        self.between_batches = False
        self._sized: Any = None
        self._size = 1
        self._collectives = collectives
        self._world = world
        self._device = device
        self._training = training
        self._slots: dict[str, _Slot] = {}

    def log(self, name: str, value: Any, asked: Options, batch_size: int | None = None) -> None:
        """Store one value. The first call of a name fixes its options."""
        slot = self._slots.get(name + self.suffix if self.suffix else name)
        if slot is None or slot.asked != asked:
            slot = self._open(name + self.suffix, value, asked)
        if slot.metric is not None:
            if not _has_compute(value):
                raise _unusable(slot.name, value, "an object with compute() and reset(), as before")
            slot.metric = value
            slot.fresh = slot.pending = True
            return
        if isinstance(value, torch.Tensor):
            value = value.detach()
        slot.last = value
        slot.fresh = True
        if slot.on_epoch:
            slot.values.append(value)
            slot.weights.append(self._batch_size() if batch_size is None else batch_size)
            if len(slot.values) >= _FOLD_AT:
                slot.fold()

    def _batch_size(self) -> int:
        if self.between_batches or self.batch is None:
            return 1
        if self._sized is not self.batch:
            self._sized = self.batch
            self._size = size_of(self.batch)
        return self._size

    def _open(self, name: str, value: Any, asked: Options) -> _Slot:
        known = self._slots.get(name)
        if known is not None and not known.adopted:
            raise UserCodeError(
                f"log({name!r}) was called with {asked} after {known.asked}.",
                "Log one name with the same options everywhere in a phase.",
            )
        if not (_has_compute(value) or _is_single(value)):
            raise _unusable(name, value)
        step_by_default = self._training and not self.between_batches
        on_step = step_by_default if asked.on_step is None else asked.on_step
        on_epoch = not step_by_default if asked.on_epoch is None else asked.on_epoch
        slot = _Slot(name, asked, on_step=on_step, on_epoch=on_epoch)
        slot.metric = value if _has_compute(value) else None
        if known is not None:
            slot.continue_from(known)
        self._slots[name] = slot
        return slot

    def step_values(self) -> Logged:
        """The newest value of everything logged per step since the last log point."""
        slots = [slot for slot in self._slots.values() if slot.on_step and slot.fresh]
        logged = Logged()
        synced = [slot for slot in slots if slot.asked.sync_dist]
        values = dict(zip(slots, _to_host([_newest(slot) for slot in slots]), strict=True))
        if self._world.size > 1 and self._syncs_steps():
            rows = [
                _Row(slot.name, slot.reduction, values[slot], 1.0, slot.on_step, slot.asked[:2])
                for slot in synced
            ]
            reduced = self._over_ranks(rows)
            values.update(zip(synced, reduced[: len(synced)], strict=True))
        for slot, value in values.items():
            slot.fresh = False
            name = f"{slot.name}_step" if slot.on_epoch else slot.name
            _sort_in(logged, slot, name, value)
        return logged

    def _syncs_steps(self) -> bool:
        """Whether ranks exchange step values; also if this one has nothing new to tell."""
        return any(slot.on_step and slot.asked.sync_dist for slot in self._slots.values())

    def epoch_values(self) -> Logged:
        """What the epoch has added up, reduced over ranks; empties it."""
        logged = Logged()
        slots = [slot for slot in self._slots.values() if slot.on_epoch]
        for slot in slots:
            if slot.metric is not None and slot.pending:
                _sort_in_epoch(logged, slot, float(slot.metric.compute()))
                slot.metric.reset()
                slot.pending = False
        rows = self._rows()
        for row, value in zip(rows, self._epoch_over_ranks(rows), strict=True):
            slot = self._slots[row.name]
            _sort_in_epoch(logged, slot, value)
            slot.clear()
        return logged

    def _rows(self) -> list[_Row]:
        return [
            _Row(name, slot.reduction, slot.total(), slot.weight, slot.on_step, slot.asked[:2])
            for name, slot in self._slots.items()
            if slot.on_epoch and slot.metric is None and (slot.values or slot.partials)
        ]

    def _epoch_over_ranks(self, rows: list[_Row]) -> list[float]:
        """Reduce every row that is to be reduced; ``rows`` gains what only other ranks logged."""
        own = [_finish(row.reduction, [row.total], [row.weight]) for row in rows]
        if self._world.size == 1:
            return own
        local = {name for name, slot in self._slots.items() if slot.asked.sync_dist is False}
        shared = [row for row in rows if row.name not in local]
        reduced = dict(zip((row.name for row in shared), self._over_ranks(shared), strict=True))
        for row in [row for row in shared if row not in rows]:
            self._adopt(row)
            rows.append(row)
        return [reduced[row.name] if row.name in reduced else own[n] for n, row in enumerate(rows)]

    def _over_ranks(self, rows: list[_Row]) -> list[float]:
        """Reduce rows over all ranks in one collective; ``rows`` gains what only others logged."""
        key = zlib.crc32("\n".join(f"{row.name}={row.reduction}" for row in rows).encode())
        flat = [number for row in rows for number in (row.total, row.weight)]
        gathered = gather_numbers(key, flat, self._collectives, self._world, self._device)
        if gathered is not None:
            return [
                _finish(
                    row.reduction, [r[2 * n] for r in gathered], [r[2 * n + 1] for r in gathered]
                )
                for n, row in enumerate(rows)
            ]
        # Ranks logged different names, as when one had no batch: tell each other everything.
        tables = [
            {row.name: row for row in theirs}
            for theirs in gather_objects(rows, self._collectives, self._device)
        ]
        known = {row.name for row in rows}
        for row in (row for table in tables for row in table.values()):
            if row.name not in known:
                known.add(row.name)
                rows.append(row._replace(total=0.0, weight=0.0))
        present = [[table[row.name] for table in tables if row.name in table] for row in rows]
        return [
            _finish(row.reduction, [r.total for r in theirs], [r.weight for r in theirs])
            for row, theirs in zip(rows, present, strict=True)
        ]

    def _adopt(self, row: _Row) -> None:
        """Know a name that only other ranks have logged so far."""
        if row.name not in self._slots:
            asked = Options(row.shown[0], row.shown[1], reduce_fx=row.reduction)
            slot = _Slot(row.name, asked, on_step=row.on_step, on_epoch=True)
            slot.adopted = True
            self._slots[row.name] = slot

    def state_dict(self) -> dict[str, Any]:
        """What an unfinished epoch has added up on this rank, as JSON values."""
        state = {}
        for name, slot in self._slots.items():
            if slot.on_epoch and slot.metric is None:
                slot.partials = _to_host(slot.partials)
                state[name] = {
                    "asked": [*slot.asked[:4], slot.reduction, slot.asked.sync_dist],
                    "on_step": slot.on_step,
                    "partials": list(slot.partials),
                    "weight": slot.weight,
                    "values": _to_host(slot.values),
                    "device": [isinstance(value, torch.Tensor) for value in slot.values],
                    "weights": list(slot.weights),
                }
        return state

    def load_state_dict(self, state: Mapping[str, Any], *lost: Mapping[str, Any]) -> None:
        """Continue an epoch from what ``state_dict`` returned, and what ``lost`` ranks had."""
        for name, saved in state.items():
            self._slots[name] = self._slot_of(name, saved)
        for theirs in lost:
            for name, saved in theirs.items():
                slot = self._slot_of(name, saved)
                known = self._slots.setdefault(name, slot)
                if known is not slot and known.reduction == slot.reduction:
                    known.add(slot)

    def _slot_of(self, name: str, saved: Mapping[str, Any]) -> _Slot:
        slot = _Slot(name, Options(*saved["asked"]), on_step=saved["on_step"], on_epoch=True)
        slot.adopted = True
        slot.partials = list(saved["partials"])
        slot.weight = saved["weight"]
        slot.weights = list(saved["weights"])
        slot.values = [
            torch.tensor(value, device=self._device) if on_device else value
            for value, on_device in zip(saved["values"], saved["device"], strict=True)
        ]
        return slot


def _reduction(asked: Any, name: str) -> str:
    called = asked if isinstance(asked, str) else getattr(asked, "__name__", repr(asked))
    if called not in _REDUCTIONS:
        raise ConfigurationError(
            f"log({name!r}) was called with reduce_fx={asked!r}.",
            f"Use one of {', '.join(sorted(_REDUCTIONS))}.",
        )
    return called


def _newest(slot: _Slot) -> Any:
    if slot.metric is not None:
        return slot.metric.compute()
    if not _is_single(slot.last):
        raise _unusable(slot.name, slot.last)
    return slot.last


def _has_compute(value: Any) -> bool:
    return hasattr(value, "compute") and hasattr(value, "reset")


def _is_single(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float))


def _unusable(
    name: str, value: Any, wanted: str = "a number or a tensor of one element, such as value.mean()"
) -> UserCodeError:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return UserCodeError(
        f"log({name!r}) was called with a {type(value).__name__}{shape}.", f"Log {wanted}."
    )


def _fold_host(values: list[Any], weights: list[float], reduction: str) -> float:
    if reduction == "mean":
        return math.fsum(value * weight for value, weight in zip(values, weights, strict=True))
    return float({"min": min, "max": max}.get(reduction, math.fsum)(values))


def _fold_device(values: list[Any], weights: list[float], reduction: str) -> torch.Tensor:
    device = next(value.device for value in values if isinstance(value, torch.Tensor))
    stacked = torch.stack(
        [torch.as_tensor(value, device=device).reshape(()).float() for value in values]
    )
    if reduction == "mean":
        if all(weight == weights[0] for weight in weights):
            return stacked.sum() * weights[0]
        return (stacked * torch.tensor(weights, device=device, dtype=stacked.dtype)).sum()
    return {"min": stacked.min, "max": stacked.max}.get(reduction, stacked.sum)()


def _to_host(values: Sequence[Any]) -> list[float]:
    """Numbers from tensors and numbers, with one read-back per device."""
    on_device = [value for value in values if isinstance(value, torch.Tensor)]
    if not on_device:
        return [float(value) for value in values]
    devices = {value.device for value in on_device}
    if len(devices) > 1:
        return [float(value) for value in values]
    # Counts and doubles keep their digits; a device without doubles cannot hold them anyway.
    wide = any(value.dtype in {torch.int64, torch.float64} for value in on_device)
    kind = torch.float64 if wide else torch.float32
    read = iter(torch.stack([value.detach().reshape(()).to(kind) for value in on_device]).tolist())
    return [next(read) if isinstance(value, torch.Tensor) else float(value) for value in values]


def _finish(reduction: str, totals: Sequence[float], weights: Sequence[float]) -> float:
    if reduction == "mean":
        weight = math.fsum(weights)
        return math.fsum(totals) / weight if weight else math.nan
    return {"min": min, "max": max}.get(reduction, math.fsum)(totals)


def _sort_in_epoch(logged: Logged, slot: _Slot, value: float) -> None:
    _sort_in(logged, slot, f"{slot.name}_epoch" if slot.on_step else slot.name, value)
    logged.everything[slot.name] = value


def _sort_in(logged: Logged, slot: _Slot, name: str, value: float) -> None:
    logged.everything[name] = value
    if slot.asked.logger:
        logged.logger[name] = value
    if slot.asked.prog_bar:
        logged.prog_bar[name] = value
