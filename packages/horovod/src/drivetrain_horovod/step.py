"""What is Horovod's in a step: gradients are reduced while backward runs, and waited for after."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from types import ModuleType

    from drivetrain_interfaces import Precision, StepResult, StepSpec, TrainStep
    from torch.optim import Optimizer
    from typing_extensions import Self


class Reduction:
    """Horovod's wrappers around the optimizers of a step, of which only the reduction is used.

    The optimizers themselves update, so that schedulers and states belong to them.

    Args:
        hvd: Horovod.
        spec: What to train.
        compression: What Horovod sends gradients as.
        precision: The numeric format.
        groups: How many messages parameters are put into; None is Horovod's choice.
        factor: What learning rates are multiplied by while an update lasts.
    """

    def __init__(
        self,
        hvd: ModuleType,
        spec: StepSpec,
        precision: Precision,
        *,
        compression: Any,
        groups: int | None,
        factor: int = 1,
    ) -> None:
        names = {id(p): name for name, p in spec.module.named_parameters()}
        self._step = precision.step
        self._factor = factor
        self._passes = spec.accumulate
        self._wrapped = []
        for number, optimizer in enumerate(spec.optimizers):
            mine = [
                (f"{number}.{names.get(id(p), f'{group}.{index}')}", p)
                for group, entry in enumerate(optimizer.param_groups)
                for index, p in enumerate(entry["params"])
            ]
            groups_before = list(optimizer.param_groups)
            self._wrapped.append(
                hvd.DistributedOptimizer(
                    optimizer,
                    named_parameters=mine,
                    compression=compression,
                    backward_passes_per_step=spec.accumulate,
                    groups=groups,
                )
            )
            assert optimizer.param_groups == groups_before, "the wrapper leaves the optimizer alone"

    def update(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Wait until gradients are reduced, then update as the precision does."""
        for wrapped in self._wrapped:
            wrapped.synchronize()
            wrapped._synchronized = False  # noqa: SLF001 - its own step, which is not used, would do it
        if self._factor == 1:
            return self._step(optimizers, prepare)
        with _multiplied(optimizers, self._factor):
            return self._step(optimizers, prepare)

    def discard(self) -> None:
        """Forget the backward passes of half a window."""
        for wrapped in self._wrapped:
            wrapped._handles.clear()  # noqa: SLF001 - Horovod has no call for it
            wrapped.set_backward_passes_per_step(self._passes)

    def close(self) -> None:
        """Take Horovod's hooks off the parameters: they live as long as what they hang on."""
        for wrapped in self._wrapped:
            wrapped._grad_accs.clear()  # noqa: SLF001 - Horovod has no call for it
            wrapped._handles.clear()  # noqa: SLF001
        self._wrapped = []


@contextmanager
def _multiplied(optimizers: Sequence[Optimizer], factor: int) -> Iterator[None]:
    """Larger learning rates for one update. Schedulers and saved states have the user's own."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


class HorovodStep:
    """An eager step that leaves nothing of half a window behind when user code raises.

    Args:
        step: What trains.
        reduction: What it reduces with.
    """

    __slots__ = ("_reduction", "_step")

    def __init__(self, step: TrainStep, reduction: Reduction) -> None:
        self._step = step
        self._reduction = reduction

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window; see ``EagerTrainStep``."""
        try:
            return self._step(microbatches)
        except BaseException:
            self._reduction.discard()
            raise

    def release(self) -> None:
        """Let go of the module. The step cannot be called any more."""
        self._step.release()  # type: ignore[attr-defined]  # an EagerTrainStep

    def __enter__(self) -> Self:
        self._step.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._step.__exit__(*exc)
