"""The strategy: several processes, one device each, gradients averaged by Horovod."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_toolkit.checks import needs_closure
from drivetrain_toolkit.steps import make_train_step
from drivetrain_toolkit.strategies import EagerStrategy

from drivetrain_horovod.starting import start
from drivetrain_horovod.step import HorovodStep, Reduction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from drivetrain_interfaces import ManualSpec, ManualStep, StepSpec, StrategyContext, TrainStep
    from torch import nn
    from typing_extensions import Self

_COMPRESSIONS = ("none", "fp16")


@dataclass(frozen=True, slots=True)
class Options:
    """What ``HorovodStrategy`` takes.

    Attributes:
        compression: ``"fp16"`` sends gradients in half precision; ``"none"`` as they are.
        groups: How many messages parameters are put into; None is Horovod's choice.
    """

    compression: str = "none"
    groups: int | None = None


class HorovodStrategy(EagerStrategy):
    """Data parallel training by Horovod. Learning rates are left as they are.

    Args:
        compression: ``"fp16"`` sends gradients in half precision; ``"none"`` as they are.
        groups: How many messages parameters are put into; None is Horovod's choice.

    Raises:
        ConfigurationError: An option that there is not, or with a value that there is not.
    """

    name = "horovod"

    _hvd: ModuleType
    _reduction: Reduction | None = None
    _step: HorovodStep | None = None

    def __init__(self, *, compression: str = "none", groups: int | None = None) -> None:
        self.options = _checked(Options(compression, groups))

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
            self._hvd, spec, precision, compression=compression, groups=self.options.groups
        )
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

    def close(self) -> None:
        """Take Horovod's hooks off the parameters, and release the device."""
        self._release()
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        try:
            self.options = _checked(Options(**{"compression": self.options.compression, **options}))
        except TypeError as error:
            raise ConfigurationError(
                f"The strategy 'horovod' was given the options {sorted(options)}; it takes "
                "['compression', 'groups'].",
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
