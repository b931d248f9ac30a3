"""The Trainer's loop settings, checked together before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from drivetrain_interfaces import Clip, ConfigurationError, Feature

from drivetrain.durations import seconds_of
from drivetrain.plan import Want

_NAN_POLICIES = ("raise", "warn", "ignore")
_CLIP_ALGORITHMS = ("norm", "value")


@dataclass(frozen=True)
class Settings:
    """How long to train, how often to do what. Fields are the Trainer's arguments.

    Raises:
        ConfigurationError: Values that mean nothing or exclude each other; all of them at once.
    """

    max_epochs: int | None = None
    max_steps: int = -1
    max_time: timedelta | dict[str, float] | str | None = None
    limit_train_batches: float | None = None
    limit_val_batches: float | None = None
    limit_test_batches: float | None = None
    limit_predict_batches: float | None = None
    fast_dev_run: int | bool = False
    val_check_interval: float | None = None
    check_val_every_n_epoch: int = 1
    num_sanity_val_steps: int = 2
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    log_every_n_steps: int = 50
    nan_loss: str = "raise"
    hang_timeout: float | timedelta | None = 600.0

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        self._check_counts(problems)
        self._check_choices(problems)
        if problems:
            raise ConfigurationError.conflicts(problems)

    def _check_counts(self, problems: list[tuple[str, str]]) -> None:
        smallest = {
            "max_epochs": 0,
            "max_steps": -1,
            "check_val_every_n_epoch": 1,
            "num_sanity_val_steps": -1,
            "accumulate_grad_batches": 1,
            "log_every_n_steps": 1,
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is None and name == "max_epochs":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(
                    (
                        f"{name}={value!r} was asked for.",
                        f"Give a whole number of at least {least}.",
                    )
                )
        for name in ("train", "val", "test", "predict"):
            _check_limit(f"limit_{name}_batches", getattr(self, f"limit_{name}_batches"), problems)
        interval = self.val_check_interval
        if interval is not None and not (_is_limit(interval) and interval > 0):
            problems.append(
                (
                    f"val_check_interval={interval!r} was asked for.",
                    "Give a positive number of batches or a fraction of an epoch.",
                )
            )
        if not isinstance(self.fast_dev_run, int) or self.fast_dev_run < 0:
            problems.append(
                (
                    f"fast_dev_run={self.fast_dev_run!r} was asked for.",
                    "Give True, False or a number of batches.",
                )
            )

    def _check_choices(self, problems: list[tuple[str, str]]) -> None:
        if self.nan_loss not in _NAN_POLICIES:
            problems.append(
                (f"nan_loss={self.nan_loss!r} was asked for.", f"Use one of {_NAN_POLICIES}.")
            )
        if self.gradient_clip_algorithm not in _CLIP_ALGORITHMS:
            problems.append(
                (
                    f"gradient_clip_algorithm={self.gradient_clip_algorithm!r} was asked for.",
                    f"Use one of {_CLIP_ALGORITHMS}.",
                )
            )
        if self.gradient_clip_val is not None and not _is_positive(self.gradient_clip_val):
            problems.append(
                (
                    f"gradient_clip_val={self.gradient_clip_val!r} was asked for.",
                    "Give a positive number, or leave it out to clip nothing.",
                )
            )
        if self.hang_timeout is not None and not (self.hang_seconds or 0) > 0:
            problems.append(
                (
                    f"hang_timeout={self.hang_timeout!r} was asked for.",
                    "Give seconds or a timedelta, more than 0, or None for no such limit.",
                )
            )
        try:
            _ = self.seconds
        except ConfigurationError as error:
            problems.append((f"max_time: {error.message}", error.hint))

    def check_limit_is_set(self) -> None:
        """A fit without any limit is a mistake. Raises ``ConfigurationError``."""
        if self.max_epochs is None and self.max_steps < 0 and self.max_time is None:
            raise ConfigurationError(
                "fit was called without a limit: max_epochs, max_steps and max_time are not set.",
                "Set one of them, such as Trainer(max_epochs=10).",
            )

    @property
    def clip(self) -> Clip | None:
        """Gradient clipping for the step."""
        if self.gradient_clip_val is None:
            return None
        return Clip(float(self.gradient_clip_val), self.gradient_clip_algorithm)

    @property
    def seconds(self) -> float | None:
        """``max_time`` in seconds."""
        return None if self.max_time is None else seconds_of(self.max_time)

    @property
    def hang_seconds(self) -> float | None:
        """``hang_timeout`` in seconds; 0 for what is no time."""
        given = self.hang_timeout
        if given is None or (isinstance(given, (int, float)) and not isinstance(given, bool)):
            return given
        return given.total_seconds() if isinstance(given, timedelta) else 0.0

    @property
    def wants(self) -> tuple[Want, ...]:
        """What these settings need of a strategy."""
        wants = []
        if self.accumulate_grad_batches > 1:
            wants.append(
                Want(
                    Feature.ACCUMULATION, f"accumulate_grad_batches={self.accumulate_grad_batches}"
                )
            )
        if self.gradient_clip_val is not None:
            feature = (
                Feature.CLIP_NORM if self.gradient_clip_algorithm == "norm" else Feature.CLIP_VALUE
            )
            wants.append(Want(feature, f"gradient_clip_val={self.gradient_clip_val}"))
        return tuple(wants)


def _check_limit(name: str, value: Any, problems: list[tuple[str, str]]) -> None:
    if value is not None and not _is_limit(value):
        problems.append(
            (
                f"{name}={value!r} was asked for.",
                "Give a whole number of batches, or a fraction from 0.0 to 1.0.",
            )
        )


def _is_limit(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= 0 if isinstance(value, int) else 0.0 <= value <= 1.0


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
