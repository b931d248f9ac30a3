"""What a backend or a strategy says it can do. Everything declared is tested, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Feature(str, Enum):
    """An ability that a step, a strategy or a device may lack.

    A member that is not declared must be refused with ``UnsupportedError`` when asked for.
    """

    ACCUMULATION = "accumulation"
    """A step takes several microbatches and updates once."""
    CLIP_NORM = "clip-norm"
    """Gradients can be clipped to a total norm, and the norm is reported."""
    CLIP_VALUE = "clip-value"
    """Gradients can be clipped element by element."""
    CLOSURE = "closure"
    """Optimizers that evaluate the loss again (L-BFGS) work."""
    SEVERAL_OPTIMIZERS = "several-optimizers"
    """One step may update with more than one optimizer."""
    MANUAL_STEP = "manual-step"
    """The user's code may call backward and the optimizers itself."""
    SYNC_BATCHNORM = "sync-batchnorm"
    """Batch statistics can be taken over all processes."""
    INFERENCE_MODE = "inference-mode"
    """Evaluation may run under ``torch.inference_mode``."""
    DETERMINISTIC = "deterministic"
    """Two runs with the same seed and the same world are equal bit for bit."""
    SEVERAL_PROCESSES = "several-processes"
    """More than one process may train one model."""


class StepHook(str, Enum):
    """A moment inside a train step at which user code may be called."""

    BEFORE_BACKWARD = "before_backward"
    AFTER_BACKWARD = "after_backward"
    BEFORE_OPTIMIZER_STEP = "before_optimizer_step"
    BEFORE_ZERO_GRAD = "before_zero_grad"


ALL_STEP_HOOKS = frozenset(StepHook)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one backend or one strategy declares.

    Attributes:
        features: The abilities; whatever is missing is refused.
        precisions: Names of the precisions that can be made, such as ``"bf16-mixed"``.
        hooks: The moments inside a step at which user code can be called.
    """

    features: frozenset[Feature] = frozenset()
    precisions: frozenset[str] = frozenset()
    hooks: frozenset[StepHook] = ALL_STEP_HOOKS

    def __contains__(self, feature: Feature) -> bool:
        return feature in self.features

    def meet(self, other: Capabilities) -> Capabilities:
        """What both can do: a strategy on a backend has no ability that either lacks."""
        return Capabilities(
            features=self.features & other.features,
            precisions=self.precisions & other.precisions,
            hooks=self.hooks & other.hooks,
        )

    def missing(self, wanted: Iterable[Feature]) -> tuple[Feature, ...]:
        """The members of ``wanted`` that are not declared, in order of their names."""
        return tuple(sorted(set(wanted) - self.features, key=lambda feature: feature.value))
