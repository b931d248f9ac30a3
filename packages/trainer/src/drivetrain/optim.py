"""What ``configure_optimizers`` may return, brought into one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from drivetrain_interfaces import UserCodeError
from torch.optim.lr_scheduler import ReduceLROnPlateau

_SHAPES = (
    "an optimizer, a list of optimizers, a pair of lists (optimizers, schedulers), or a dictionary "
    "with 'optimizer' and 'lr_scheduler'"
)
_OPTIMIZER_KEYS = {"optimizer", "lr_scheduler"}
_KEYS = {"scheduler", "interval", "frequency", "monitor", "name", "strict"}


def load_optimizers() -> None:
    """Have torch load what it loads with the first optimizer of a process: about a second."""
    torch.optim.SGD([torch.zeros(1)], lr=0.1)


@dataclass(slots=True)
class Scheduled:
    """A learning rate scheduler, and when it steps.

    Attributes:
        scheduler: Anything with ``step``, ``state_dict`` and ``load_state_dict``.
        interval: ``"step"`` counts applied optimizer steps, ``"epoch"`` counts epochs.
        frequency: Steps once per so many intervals.
        monitor: The metric that ``ReduceLROnPlateau`` reads.
        name: The name for logs, or None.
        optimizer_index: Position of its optimizer, for logs.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    name: str | None = None
    optimizer_index: int = 0

    @property
    def needs_metric(self) -> bool:
        """Whether ``step`` takes the monitored value."""
        return isinstance(self.scheduler, ReduceLROnPlateau)


def configured(returned: Any, owner: str) -> tuple[list[torch.optim.Optimizer], list[Scheduled]]:
    """Optimizers and schedulers from whatever shape the user returned.

    Args:
        returned: The value of ``configure_optimizers``.
        owner: Name of the user's class, for messages.

    Raises:
        UserCodeError: The shape is none of the known ones.
    """
    optimizers: list[torch.optim.Optimizer] = []
    schedulers: list[Scheduled] = []
    if returned is None:
        return optimizers, schedulers
    for item in _items(returned):
        if isinstance(item, torch.optim.Optimizer):
            optimizers.append(item)
        elif isinstance(item, Mapping) and isinstance(item.get("optimizer"), torch.optim.Optimizer):
            _refuse_other_keys(item, owner)
            optimizers.append(item["optimizer"])
            if item.get("lr_scheduler") is not None:
                schedulers.append(_scheduled(item["lr_scheduler"], owner))
        elif isinstance(item, _Scheduler):
            schedulers.append(_scheduled(item.value, owner))
        else:
            raise UserCodeError(
                f"{owner}.configure_optimizers returned a {type(item).__name__} where an optimizer "
                "belongs.",
                f"Return {_SHAPES}.",
            )
    for scheduled in schedulers:
        scheduled.optimizer_index = _index_of(scheduled.scheduler, optimizers)
    return optimizers, schedulers


@dataclass(frozen=True, slots=True)
class _Scheduler:
    value: Any


def _items(returned: Any) -> list[Any]:
    """The parts of a returned value; schedulers of the pair form come wrapped."""
    if isinstance(returned, (torch.optim.Optimizer, Mapping)):
        return [returned]
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        return [returned]
    pair = (
        len(returned) == 2  # noqa: PLR2004
        and isinstance(returned[0], Sequence)
        and isinstance(returned[1], Sequence)
    )
    if pair:
        return [*returned[0], *(_Scheduler(value) for value in returned[1])]
    return list(returned)


def _refuse_other_keys(item: Mapping[str, Any], owner: str) -> None:
    if not set(item) <= _OPTIMIZER_KEYS:
        raise UserCodeError(
            f"{owner}.configure_optimizers returned an optimizer with the keys "
            f"{sorted(map(str, item))}.",
            "Give 'optimizer' and 'lr_scheduler'; all that belongs to a scheduler, such as "
            "'monitor', goes into a dictionary under 'lr_scheduler'.",
        )


def _scheduled(value: Any, owner: str) -> Scheduled:
    if not isinstance(value, Mapping):
        value = {"scheduler": value}
    unknown = set(value) - _KEYS
    if unknown or "scheduler" not in value:
        raise UserCodeError(
            f"{owner}.configure_optimizers returned a scheduler with the keys "
            f"{sorted(map(str, value))}.",
            f"Give 'scheduler' and any of {sorted(_KEYS - {'scheduler'})}.",
        )
    made = Scheduled(**{key: item for key, item in value.items() if key != "strict"})
    if not callable(getattr(made.scheduler, "step", None)):
        raise UserCodeError(
            f"{owner}.configure_optimizers returned a {type(made.scheduler).__name__} where a "
            "scheduler belongs.",
            "Return one scheduler for each optimizer, or a dictionary with 'scheduler'.",
        )
    counts = isinstance(made.frequency, int) and made.frequency >= 1
    if made.interval not in {"step", "epoch"} or not counts:
        raise UserCodeError(
            f"{owner}.configure_optimizers returned a scheduler with interval={made.interval!r} "
            f"and frequency={made.frequency!r}.",
            "Use the interval 'step' or 'epoch' and a frequency of at least 1.",
        )
    if made.needs_metric and made.monitor is None:
        raise UserCodeError(
            f"{owner}.configure_optimizers returned a ReduceLROnPlateau without a metric to watch.",
            "Return a dictionary with 'scheduler' and 'monitor'.",
        )
    return made


def _index_of(scheduler: Any, optimizers: list[torch.optim.Optimizer]) -> int:
    own = getattr(scheduler, "optimizer", None)
    return next((n for n, optimizer in enumerate(optimizers) if optimizer is own), 0)
