"""Ranks that train on their own for some steps, and then average what they have (local SGD).

Torch does the work: ``post_localSGD_hook`` decides which ranks average gradients, and
``PeriodicModelAverager`` averages parameters. Here is what a strategy needs besides: one count for
both that a checkpoint holds, and a state that is no single rank's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from drivetrain_interfaces import StepResult
    from torch.optim import Optimizer
    from typing_extensions import Self

    from drivetrain_toolkit.steps import EagerTrainStep, Update

#: Where the count is in an optimizer's state: no parameter has this name.
KEY = "drivetrain.model_averaging"


class LocalSGD:
    """Which ranks average what, and when.

    Args:
        period: Windows from one average of parameters to the next; 2 or more.
        start: Windows at the beginning in which all ranks average gradients.
        group: Ranks that average gradients in every window afterwards; 1 means none. A divisor of
            the number of ranks.
    """

    def __init__(self, period: int, start: int, group: int) -> None:
        self._averager = PeriodicModelAverager(period, start)
        subgroup = dist.new_subgroups(group)[0] if group > 1 else None  # type: ignore[no-untyped-call]
        self._hook_state = PostLocalSGDState(None, subgroup, start, group > 1)  # type: ignore[no-untyped-call]

    @property
    def count(self) -> int:
        """Windows that were trained on."""
        steps: int = self._averager.step
        return steps

    def register(self, wrapper: Any) -> None:
        """Let the wrapper average gradients over those ranks that the count says."""
        wrapper.register_comm_hook(self._hook_state, post_localSGD_hook)

    def begin(self) -> None:
        """A window begins. The hook counts backward passes, which may be more than windows."""
        self._hook_state.iter = self._averager.step

    def updating(self, step: Update) -> Update:
        """``step``, and the average of parameters when it is due. Gradients say which there are."""

        def update(optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
            applied = step(optimizers, prepare)
            groups = [group for each in optimizers for group in each.param_groups]
            self._averager.average_parameters(groups)
            return applied

        return update

    def around(self, step: EagerTrainStep, finish: Callable[[], None]) -> LocalSGDStep:
        """A step that makes ranks equal by ``finish`` when it is left."""
        return LocalSGDStep(step, self, finish)

    def note(self, optimizers: Sequence[dict[str, Any]]) -> None:
        """Write the count into what ``gather_optimizer`` returned."""
        for saved in optimizers[:1]:
            saved["state"][KEY] = {"count": self.count}

    def read(self, optimizers: Sequence[Mapping[str, Any]]) -> None:
        """Take over the count of a saved state; of one that has none, begin anew."""
        saved = optimizers[0]["state"].get(KEY) if optimizers else None
        self._averager.step = 0 if saved is None else int(saved["count"])


class LocalSGDStep:
    """A train step of ranks that differ. Leaving it without an error makes them equal.

    Args:
        step: Trains on a window.
        averaging: Which ranks average what.
        finish: Averages all parameters and buffers.
    """

    def __init__(
        self, step: EagerTrainStep, averaging: LocalSGD, finish: Callable[[], None]
    ) -> None:
        self._step = step
        self._averaging = averaging
        self._finish = finish

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window."""
        self._averaging.begin()
        return self._step(microbatches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._finish()
