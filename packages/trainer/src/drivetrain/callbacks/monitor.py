"""One metric that a callback watches: its direction, where it comes from, and whether it is new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError
from drivetrain_interfaces.errors import listed

if TYPE_CHECKING:
    from drivetrain.trainer import Trainer

MODES = ("max", "min")


class Monitor:
    """Watches one metric.

    A metric that first appears during a validation belongs to validation: between two validations
    its value is old and says nothing about the weights of now. Any other metric is always new.

    Args:
        name: The metric's name in ``trainer.callback_metrics``.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is.
        owner: The callback, for messages.

    Attributes:
        from_validation: Whether the metric belongs to validation.
        validations: How many validations have been completed.
        validated_step: ``trainer.global_step`` at the end of the latest; -1 before the first.

    Raises:
        ConfigurationError: ``mode`` is neither.
    """

    def __init__(self, name: str, mode: str, owner: str) -> None:
        if mode not in MODES:
            raise ConfigurationError(
                f"{owner} was given mode={mode!r}.", f"Use one of: {listed(MODES)}."
            )
        self.name = name
        self.mode = mode
        self.owner = owner
        self.reset()

    def reset(self) -> None:
        """A fit begins: nothing is known about the metric."""
        self.from_validation = False
        self.validations = 0
        self.validated_step = -1
        self._known_before = False

    def better(self, new: float, old: float) -> bool:
        """Whether ``new`` beats ``old``. NaN beats nothing."""
        return new < old if self.mode == "min" else new > old

    def validation_starts(self, trainer: Trainer) -> None:
        """Call it from ``on_validation_start``."""
        self._known_before = self.name in trainer.callback_metrics

    def validation_ends(self, trainer: Trainer) -> None:
        """Call it at ``Moment.VALIDATION``, when a whole validation is over."""
        if not self._known_before and self.name in trainer.callback_metrics:
            self.from_validation = True
        self.validations += 1
        self.validated_step = trainer.global_step

    def value(self, trainer: Trainer) -> float | None:
        """The newest value on this rank, or None before there is one."""
        value: Any = trainer.callback_metrics.get(self.name)
        return None if value is None else float(value)

    def is_old(self, trainer: Trainer) -> bool:
        """Whether the value is that of an earlier validation, and so of other weights."""
        return self.from_validation and self.validated_step != trainer.global_step

    def may_still_come(self, trainer: Trainer) -> bool:
        """Whether a metric that is missing may be one of a validation that has not run yet."""
        return self.validations == 0 and any(count > 0 for count in trainer.num_val_batches)

    def missing(self, available: list[str]) -> ConfigurationError:
        """The error for a metric that nobody logs."""
        return ConfigurationError(
            f"{self.owner} watches {self.name!r}, which is not among the logged metrics "
            f"({listed(available)}).",
            "Log it with self.log in every epoch, or set monitor to one of them.",
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know about the metric."""
        return {
            "from_validation": self.from_validation,
            "validations": self.validations,
            "validated_step": self.validated_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.from_validation = state["from_validation"]
        self.validations = state["validations"]
        self.validated_step = state["validated_step"]
