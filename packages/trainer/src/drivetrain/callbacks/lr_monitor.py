"""Logging learning rates."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks.base import Callback

if TYPE_CHECKING:
    import torch

    from drivetrain.module import Module
    from drivetrain.trainer import Trainer

_INTERVALS = ("epoch", "step")


class LearningRateMonitor(Callback):
    """Logs the learning rate of every parameter group of every optimizer.

    A value is logged under the step that uses it.

    Names are ``lr-SGD``, with ``/pg1``, ``/pg2`` … (or the group's own ``name``) if an optimizer
    has several groups, and ``lr-SGD-1`` for a second optimizer of the same class. A scheduler's own
    name takes the place of ``lr-SGD``.

    Args:
        logging_interval: ``"step"`` logs at log points, ``"epoch"`` at the start of an epoch. None
            logs each optimizer as often as its scheduler steps; without one, at log points.
        log_momentum: Log momentum too (the first beta of Adam and its kin).

    Raises:
        ConfigurationError: ``logging_interval`` is none of these.
    """

    def __init__(self, logging_interval: str | None = None, *, log_momentum: bool = False) -> None:
        if logging_interval is not None and logging_interval not in _INTERVALS:
            raise ConfigurationError(
                f"{type(self).__name__} was given logging_interval={logging_interval!r}.",
                "Use 'step', 'epoch' or None.",
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self._named: dict[str, list[tuple[str, torch.optim.Optimizer]]] = {}
        self._logged = -1

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Fix the names."""
        self._logged = -1
        self._named = {"step": [], "epoch": []}
        for index, name in enumerate(_names(trainer)):
            interval = self.logging_interval or _interval(trainer, index)
            self._named[interval].append((name, trainer.optimizers[index]))

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Log what goes by epoch."""
        if self._named["epoch"]:
            trainer.log_metrics(self._values("epoch"), trainer.global_step + 1)

    def on_train_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int
    ) -> None:
        """Before a step that ends at a log point, log the rates that it is going to use."""
        step = trainer.global_step + 1
        if step % trainer.log_every_n_steps or step == self._logged:
            return
        self._logged = step
        if self._named["step"]:
            trainer.log_metrics(self._values("step"), step)

    def _values(self, interval: str) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, optimizer in self._named[interval]:
            groups = optimizer.param_groups
            for number, group in enumerate(groups, 1):
                suffix = f"/{group.get('name', f'pg{number}')}" if len(groups) > 1 else ""
                values[name + suffix] = float(group["lr"])
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                    values[f"{name}-momentum{suffix}"] = float(momentum)
        return values


def _names(trainer: Trainer) -> list[str]:
    """One unique name per optimizer."""
    own = {each.optimizer_index: each.name for each in trainer.schedulers if each.name}
    seen: Counter[str] = Counter()
    names = []
    for index, optimizer in enumerate(trainer.optimizers):
        name = own.get(index) or f"lr-{type(optimizer).__name__}"
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _interval(trainer: Trainer, index: int) -> str:
    """How often the optimizer's rate changes."""
    own = {each.interval for each in trainer.schedulers if each.optimizer_index == index}
    return "epoch" if own == {"epoch"} else "step"
