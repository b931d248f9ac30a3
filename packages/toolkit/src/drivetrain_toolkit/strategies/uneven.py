"""Ranks that run out of batches early, and stand by while others train on (torch's ``Join``)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from drivetrain_interfaces import ConfigurationError, UnsupportedError, UserCodeError
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from drivetrain_toolkit.checks import needs_closure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from drivetrain_interfaces import Collectives, StepResult, StepSpec
    from typing_extensions import Self

    from drivetrain_toolkit.steps import EagerTrainStep


class UnevenStep:
    """A train step of ranks with different numbers of windows.

    All ranks enter it. One that leaves it without an error takes part in what the others send until
    the last one leaves, and then takes over the state of that one.

    Args:
        step: Trains on a window, by the wrapper.
        wrapper: What averages gradients.
        collectives: How ranks communicate.
        save: Returns what ranks that stood by lack: the state of optimizers and precision.
        load: Takes that over.
    """

    def __init__(
        self,
        step: EagerTrainStep,
        wrapper: DistributedDataParallel,
        collectives: Collectives,
        save: Callable[[], Any],
        load: Callable[[Any], None],
    ) -> None:
        self._step = step
        self._joined: list[Any] = [wrapper, _Followers(wrapper, collectives, save, load)]
        self._join: Join | None = None

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window.

        Raises:
            UserCodeError: The step was not entered.
        """
        if self._join is None:
            raise UserCodeError(
                "A train step with uneven_inputs=True was called outside of its context, in which "
                "ranks know how many of them still train.",
                "Call it inside of `with step:`.",
            )
        return self._step(microbatches)

    def __enter__(self) -> Self:
        # Gradients are the mean over the ranks that still train.
        self._join = Join(self._joined, divide_by_initial_world_size=False)
        return self

    def __exit__(self, *exc: object) -> None:
        join, self._join = self._join, None
        if join is None:
            return
        with warnings.catch_warnings():  # torch changes filters, for a warning of its own
            join.__exit__(*cast("tuple[Any, Any, Any]", exc))


class _Followers(Joinable):
    """What ranks take over at the end besides parameters and buffers."""

    def __init__(
        self,
        wrapper: DistributedDataParallel,
        collectives: Collectives,
        save: Callable[[], Any],
        load: Callable[[Any], None],
    ) -> None:
        super().__init__()
        self._wrapper = wrapper
        self._hook = _TakeOver(collectives, wrapper.join_device, save, load)

    def join_hook(self, **_: Any) -> JoinHook:
        return self._hook

    @property
    def join_device(self) -> torch.device:
        device: torch.device = self._wrapper.join_device
        return device

    @property
    def join_process_group(self) -> Any:
        return self._wrapper.join_process_group


class _TakeOver(JoinHook):
    def __init__(
        self,
        collectives: Collectives,
        device: torch.device,
        save: Callable[[], Any],
        load: Callable[[Any], None],
    ) -> None:
        self._collectives = collectives
        self._device = device
        self._save = save
        self._load = load

    def post_hook(self, is_last_joiner: bool) -> None:  # noqa: FBT001 - torch's signature
        rank = dist.get_rank()
        last = torch.tensor([rank if is_last_joiner else -1], device=self._device)
        dist.all_reduce(last, dist.ReduceOp.MAX)
        source = int(last)
        found = self._collectives.broadcast_object(self._save() if rank == source else None, source)
        if not is_last_joiner:
            self._load(found)


def check_uneven(spec: StepSpec, name: str) -> None:
    """Stop if ranks that stand by could not take part in what a step sends.

    Raises:
        UnsupportedError: The step accumulates, weighs ranks, has closures, or layers that
            communicate in forward.
    """
    found = None
    if spec.accumulate > 1:
        found = f"accumulation of {spec.accumulate} microbatches"
    elif spec.weight is not None and spec.weight_over_ranks:
        found = "weights over ranks"
    elif any(needs_closure(optimizer) for optimizer in spec.optimizers):
        found = "an optimizer that evaluates the loss itself"
    elif any(isinstance(part, nn.SyncBatchNorm) for part in spec.module.modules()):
        found = "synchronized batch normalization"
    if found is not None:
        raise UnsupportedError(
            f"uneven_inputs=True was asked of the strategy {name!r} together with {found}, in "
            "which a rank without batches cannot stand in.",
            "Leave one of them out.",
        )


def torchs_own(wrapper: Any, name: str) -> DistributedDataParallel:
    """The wrapper, if ranks without batches can join it. Raises ``ConfigurationError``."""
    if not isinstance(wrapper, DistributedDataParallel):
        raise ConfigurationError(
            f"uneven_inputs=True was asked of the strategy {name!r}, and configure_ddp made a "
            f"{type(wrapper).__name__}.",
            "Set self._model to a DistributedDataParallel, or leave uneven_inputs out.",
        )
    return wrapper
