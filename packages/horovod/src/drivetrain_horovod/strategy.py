"""The strategy: several processes, one device each, gradients averaged by Horovod."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_toolkit.checks import needs_closure
from drivetrain_toolkit.state import gather_optimizer, restore_optimizers
from drivetrain_toolkit.steps import make_train_step
from drivetrain_toolkit.strategies import EagerStrategy

from drivetrain_horovod.collectives import HorovodCollectives, make_subgroup
from drivetrain_horovod.starting import start
from drivetrain_horovod.step import HorovodStep, Reduction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from drivetrain_interfaces import (
        Collectives,
        ManualSpec,
        ManualStep,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from torch import nn
    from typing_extensions import Self

_COMPRESSIONS = ("none", "fp16")


@dataclass(frozen=True, slots=True)
class Options:
    """What ``HorovodStrategy`` takes.

    Attributes:
        compression: ``"fp16"`` sends gradients in half precision; ``"none"`` as they are.
        groups: How many messages parameters are put into; None is Horovod's choice.
        scale_learning_rate: Whether updates are made with learning rates multiplied by the number
            of ranks. Schedulers and saved states keep the rates that the user gave.
    """

    compression: str = "none"
    groups: int | None = None
    scale_learning_rate: bool = False


class HorovodStrategy(EagerStrategy):
    """Data parallel training by Horovod. Learning rates are left as they are unless it is asked.

    Args:
        compression: ``"fp16"`` sends gradients in half precision; ``"none"`` as they are.
        groups: How many messages parameters are put into; None is Horovod's choice.
        scale_learning_rate: Make updates with learning rates multiplied by the number of ranks.

    Raises:
        ConfigurationError: An option that there is not, or with a value that there is not.
    """

    name = "horovod"

    _hvd: ModuleType
    _reduction: Reduction | None = None
    _step: HorovodStep | None = None
    _weighs_ranks = False

    def __init__(
        self,
        *,
        compression: str = "none",
        groups: int | None = None,
        scale_learning_rate: bool = False,
    ) -> None:
        self.options = _checked(Options(compression, groups, scale_learning_rate))

    def __call__(self, context: StrategyContext) -> Self:
        """A copy that is bound to this process, with Horovod started.

        Raises:
            UnavailableError: Horovod is not installed.
            ClusterError: Horovod has other ranks than the run.
            UnsupportedError: The precision has gradients that Horovod does not reduce.
        """
        strategy = super().__call__(context)
        precision = context.precision
        if precision.policy.parameters == "bfloat16":
            raise UnsupportedError(
                f"precision={precision.name!r} was asked for, and Horovod does not reduce "
                "bfloat16.",
                "Use 'bf16-mixed', whose gradients are float32, or 'ddp'.",
            )
        strategy._hvd = start(context.world, context.collectives)  # noqa: SLF001 - our own copy
        return strategy

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move, and take over the parameters and buffers of rank 0, in place."""
        self._release()
        module = super().prepare(module)
        if self.context.world.size > 1:
            with torch.no_grad():
                for tensor in [*module.parameters(), *module.buffers()]:
                    tensor.copy_(self.context.collectives.broadcast(tensor.detach()))
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step. One that was built before cannot be called any more."""
        self._release()
        for optimizer in spec.optimizers:
            if needs_closure(optimizer):
                raise UnsupportedError(
                    f"{type(optimizer).__name__} evaluates the loss itself, and Horovod counts the "
                    "backward passes of an update.",
                    "Use another optimizer, or 'ddp'.",
                )
        world = self.context.world
        if world.size == 1:
            return super().train_step(spec)
        self._optimizers = tuple(spec.optimizers)
        precision = self.context.precision
        compression = getattr(self._hvd.Compression, self.options.compression)
        self._reduction = Reduction(
            self._hvd,
            spec,
            precision,
            compression=compression,
            groups=self.options.groups,
            factor=world.size if self.options.scale_learning_rate else 1,
        )
        self._weighs_ranks = spec.weight is not None and spec.weight_over_ranks
        step = make_train_step(
            spec,
            precision,
            collectives=self.context.collectives,
            world_size=world.size,
            update=self._reduction.update,
        )
        self._step = HorovodStep(step, self._reduction)
        return self._step

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step. It averages gradients at each update."""
        self._release()
        return super().manual_step(spec)

    def subgroup(self, ranks: Sequence[int]) -> Collectives | None:
        """Communication among some ranks (a process set), for code of a module; all ranks call it.

        Returns:
            The collectives, or None on a rank that is none of them.

        Raises:
            ConfigurationError: Ranks that there are not, or not each once.
        """
        assert self.context
        return make_subgroup(self._hvd, ranks)

    def join(self) -> int:
        """Say that this rank's data has ended, and wait until that of all ranks has.

        Ranks that still train average with zeros for those that joined. At the end every rank takes
        over what the last one has, so that they are equal again. Every rank calls it, once, after
        its last step.

        Returns:
            The rank whose data ended last.

        Raises:
            UnsupportedError: Weights are over all ranks, which is a message that a joined rank does
                not answer.
        """
        if self._weighs_ranks:
            raise UnsupportedError(
                "join was called with weights over all ranks, whose sum those that joined would "
                "not answer.",
                "Weigh microbatches on each rank alone, or give ranks equally many.",
            )
        module = self._prepared()
        last: int = self._hvd.join()
        everyone = HorovodCollectives(self._hvd)
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.copy_(everyone.broadcast(tensor, last))
        mine = [gather_optimizer(each, module) for each in self._optimizers]
        state = everyone.broadcast_object(mine if self.context.world.rank == last else None, last)
        restore_optimizers(self._optimizers, module, state, strict=True)
        return last

    def close(self) -> None:
        """Take Horovod's hooks off the parameters, and release the device."""
        self._release()
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        try:
            self.options = _checked(replace(self.options, **options))
        except TypeError as error:
            raise ConfigurationError(
                f"The strategy 'horovod' was given the options {sorted(options)}; it takes "
                "['compression', 'groups', 'scale_learning_rate'].",
                "Leave out the others.",
            ) from error

    def _release(self) -> None:
        if self._step is not None:
            self._step.release()
        if self._reduction is not None:
            self._reduction.close()
        self._step = self._reduction = None


def _checked(options: Options) -> Options:
    if options.compression not in _COMPRESSIONS:
        raise ConfigurationError(
            f"compression={options.compression!r} was asked of Horovod, which has 'none' and "
            "'fp16'.",
            "Use one of these.",
        )
    if options.groups is not None and options.groups < 1:
        raise ConfigurationError(
            f"groups={options.groups!r} was asked of Horovod.", "Give a positive number, or None."
        )
    return options
