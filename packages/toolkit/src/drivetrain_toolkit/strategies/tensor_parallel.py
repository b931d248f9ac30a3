"""Layers whose parameters and work are divided over ranks, by a plan (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain_interfaces import ConfigurationError
from torch.distributed.device_mesh import init_device_mesh

from drivetrain_toolkit.rows import Gathered, GatheringStep
from drivetrain_toolkit.shards import (
    Shards,
    shared_update,
)
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.steps import EagerTrainStep, make_train_step
from drivetrain_toolkit.strategies.divided import DividedStrategy
from drivetrain_toolkit.strategies.eager import (
    WholeEvalStep,
    broadcast_module,
    with_options,
)
from drivetrain_toolkit.strategies.plans import (
    SameDraws,
    Settled,
    divide,
    refuse_ties,
    styles_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        StepSpec,
        TrainStep,
    )
    from torch import nn
    from torch.distributed.tensor.parallel.style import ParallelStyle

    from drivetrain_toolkit.strategies.plans import Installed


@dataclass(frozen=True)
class TensorParallelOptions:
    """The options of ``TensorParallelStrategy``, as one value."""

    plan: Mapping[str, ParallelStyle | str] | None


class TensorParallelStrategy(DividedStrategy):
    """Each rank holds parts of some layers and does their share of the work.

    What ranks draw together is the batch, and every rank has all of it. Layers outside of the plan
    are whole on every rank, and must be given whole tensors there.

    Args:
        plan: What is divided, and how: names of modules, in which ``*`` stands for anything between
            two dots, and styles of ``torch.distributed.tensor.parallel``. ``"colwise"``,
            ``"rowwise"`` and ``"sequence"`` stand for torch's styles with their defaults.
    """

    name = "tp"
    capabilities: ClassVar = CAPABILITIES["tp"]

    _installed: Installed | None = None
    _step: EagerTrainStep | None = None

    def __init__(self, *, plan: Mapping[str, ParallelStyle | str] | None = None) -> None:
        self._options = TensorParallelOptions(plan)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, take over rank 0's values, and divide what the plan names, in place.

        Raises:
            ConfigurationError: The plan names no module, or a style that there is not.
            UnsupportedError: A style cannot divide the module, or the module shares a parameter.
        """
        self._release()
        module = super().prepare(module)
        assert self._options.plan
        styles = styles_of(self._options.plan, module, self.name)
        if self.context.world.size == 1:
            return module
        refuse_ties(module, styles, self.name)
        broadcast_module(module, self.context.collectives)
        mesh = init_device_mesh(
            self.device.type, (self.context.world.size,), mesh_dim_names=("tp",)
        )
        self._installed = divide(module, styles, mesh, self.name)
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step; it takes this rank's part of each batch.

        Raises:
            ConfigurationError: An optimizer was built before ``prepare``.
            UnsupportedError: An optimizer needs a closure, or takes whole and divided parameters
                at once.
        """
        self._refuse_closures(spec)
        if self._installed is None:
            return super().train_step(spec)
        self._refuse_foreign(spec)
        if self._step is not None:
            self._step.release()
        self._optimizers = tuple(spec.optimizers)
        self._step = make_train_step(
            spec,
            self.context.precision,
            forward=SameDraws(partial(spec.loss, spec.module), self.device),
            update=Settled(shared_update(self.context.precision, None), spec, self.name),
            parts=Shards(),
        )
        return GatheringStep(self._step, Gathered(None, self.name))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Entering it makes the module whole, so all ranks enter it.

        Between that and leaving it no rank waits for another, however many batches each has.
        """
        if self._installed is None:
            return super().eval_step(spec)
        return WholeEvalStep(spec, self.context.precision, self._installed)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def close(self) -> None:
        """Take the hooks away and release the device. The module keeps this rank's parts.

        The next ``prepare`` makes it whole; until then, using what is divided raises an error.
        """
        self._release()
        super().close()

    def _is_divided(self) -> bool:
        return self._installed is not None

    def _configure(self, options: Mapping[str, Any]) -> None:
        self._options = with_options(self.name, self._options, options)

    def _check(self) -> None:
        super()._check()
        self._refuse_sync_batchnorm()
        self._refuse_other_devices()
        if not self._options.plan:
            raise ConfigurationError(
                f"The strategy {self.name!r} was asked for without a plan.",
                "Say what is divided, as in TensorParallelStrategy(plan={'up': 'colwise', "
                "'down': 'rowwise'}).",
            )
        self._refuse_other_collectives()

    def _release(self) -> None:
        if self._step is not None:
            self._step.release()
        if self._installed is not None:
            self._installed.remove()
        self._step = self._installed = None
