"""What strategies with an eager step share, and the one for a single device."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar

import torch
from drivetrain_interfaces import (
    ConfigurationError,
    ModelState,
    SupportsStreams,
    UnsupportedError,
)
from torch import nn

from drivetrain_toolkit.checks import needs_closure
from drivetrain_toolkit.feeding import SideStreamFeed
from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)
from drivetrain_toolkit.steps import EagerEvalStep, EagerManualStep, make_train_step
from drivetrain_toolkit.trees import move

if TYPE_CHECKING:
    from collections.abc import Mapping

    from _typeshed import DataclassInstance
    from drivetrain_interfaces import (
        Collectives,
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        Precision,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from typing_extensions import Self

T = TypeVar("T", bound="DataclassInstance")

#: Device types whose tensors torch's ``SyncBatchNorm`` refuses.
_NO_SYNC_BATCHNORM = frozenset({"cpu", "mps"})


class EagerStrategy:
    """What strategies with an eager step share. Subclass one of those below, or this one.

    Attributes:
        prefetch: Copy batches beside the work, where the accelerator has a stream for that. Read
            when the strategy is bound.
    """

    name: ClassVar[str] = "eager"
    prefetch: bool = True

    _bound: StrategyContext | None = None
    _side: SideStreamFeed | None = None
    _device: torch.device
    _module: nn.Module | None = None
    _optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def __call__(self, context: StrategyContext) -> Self:
        """A copy that is bound to this process and its device; this object stays as it is.

        Raises:
            ConfigurationError: ``context.options`` holds what this strategy does not take.
        """
        strategy = copy.copy(self)
        strategy._configure(context.options)  # noqa: SLF001 - our own copy
        strategy._bound = context  # noqa: SLF001
        strategy._device = context.accelerator.activate(  # noqa: SLF001
            context.device_index, context.world.local_size
        )
        strategy._side = None  # noqa: SLF001
        if self.prefetch and isinstance(context.accelerator, SupportsStreams):
            strategy._side = SideStreamFeed(context.accelerator, strategy._device)  # noqa: SLF001
        strategy._check()  # noqa: SLF001
        return strategy

    @property
    def context(self) -> StrategyContext:
        """What this strategy was bound to. Raises ``ConfigurationError`` if it was not."""
        if self._bound is None:
            raise ConfigurationError(
                f"{type(self).__name__} was used before it was bound to a process.",
                "Call it with a StrategyContext, and use what that returns.",
            )
        return self._bound

    @property
    def device(self) -> torch.device:
        """Where batches of this process go."""
        assert self.context
        return self._device

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert to the precision and move to the device, in place.

        Raises:
            UnsupportedError: Synchronized batch normalization was asked for and the device cannot.
        """
        self._make_whole(module)
        module = self.context.precision.convert(module)
        if self.context.sync_batchnorm:
            module = self._with_sync_batchnorm(module)
        self._module = moved(module, self.device)
        return self._module

    def feed(self, batch: Any) -> Any:
        """The batch on the device; the same object if it is there already."""
        return move(batch, self._device) if self._side is None else self._side(batch)

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step."""
        self._optimizers = tuple(spec.optimizers)
        return make_train_step(spec, self.context.precision)

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step: on the module itself, never through a wrapper."""
        return EagerEvalStep(spec, self.context.precision)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step."""
        self._optimizers = tuple(spec.optimizers)
        return EagerManualStep(
            spec,
            self.context.precision,
            collectives=self.context.collectives if self.context.world.size > 1 else None,
        )

    def state(self) -> ModelState:
        """The whole state, on every rank, as copies on the host."""
        module = self._prepared()
        return ModelState(
            module=gather_module(module),
            optimizers=[gather_optimizer(item, module) for item in self._optimizers],
            precision=self.context.precision.state_dict(),
        )

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state; optimizers only if both it and the step that was built have some.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        module = self._prepared()
        restore_module(module, state.module, strict=strict)
        restore_optimizers(self._optimizers, module, state.optimizers, strict=strict)
        self.context.precision.load_state_dict(state.precision)

    def close(self) -> None:
        """Undo wrapping and release the device. Safe to call twice."""
        if self._bound is not None:
            self._bound.accelerator.close()

    def _check(self) -> None:
        """Refuse a process, a world or options that this strategy cannot serve."""

    def _refuse_other_devices(self) -> None:
        """Stop on a family of devices that torch does not run operation by operation."""
        facts = self.context.accelerator.facts
        if not getattr(facts, "eager", False):
            raise UnsupportedError(
                f"The strategy {self.name!r} was asked for on {facts.device_type!r} devices, whose "
                "backend does not declare that torch runs them operation by operation.",
                "Use a strategy that the backend brings, or set eager=True in its DeviceFacts.",
            )

    def _refuse_other_collectives(self) -> None:
        """Stop where several ranks do not speak through ``torch.distributed``."""
        if self.context.world.size > 1 and not torch.distributed.is_initialized():
            raise UnsupportedError(
                f"The strategy {self.name!r} was given collectives that are not those of "
                "torch.distributed, which it needs.",
                "Use TorchCollectives, or 'ddp' with a wrapper of your own.",
            )

    def _refuse_manual(self) -> NoReturn:
        raise UnsupportedError(
            f"A manual step was asked for, which the strategy {self.name!r} does not offer.",
            "Use automatic optimization, or 'ddp'.",
        )

    def _refuse_closures(self, spec: StepSpec) -> None:
        for optimizer in spec.optimizers:
            if needs_closure(optimizer):
                raise UnsupportedError(
                    f"{type(optimizer).__name__} evaluates the loss itself, and with the strategy "
                    f"{self.name!r} no rank holds all that it looks at.",
                    "Use another optimizer, or 'ddp'.",
                )

    def _refuse_sync_batchnorm(self) -> None:
        if self.context.sync_batchnorm:
            raise UnsupportedError(
                "Batch statistics over all processes were asked of the strategy "
                f"{self.name!r}, in which ranks share the work on one batch.",
                "Set sync_batchnorm=False, or use group or layer normalization.",
            )

    def _refuse_foreign(self, spec: StepSpec) -> None:
        known = {id(p) for p in spec.module.parameters()}
        for optimizer in spec.optimizers:
            foreign = [
                tuple(p.shape)
                for group in optimizer.param_groups
                for p in group["params"]
                if id(p) not in known
            ]
            if foreign:
                raise ConfigurationError(
                    f"{type(optimizer).__name__} was built before the strategy {self.name!r} "
                    f"divided the module: {len(foreign)} of its parameters, the first of shape "
                    f"{foreign[0]}, are none of the module's any more.",
                    "Build it from what prepare returned, such as in configure_optimizers.",
                )

    def _configure(self, options: Mapping[str, Any]) -> None:
        if options:
            raise ConfigurationError(
                f"The strategy {self.name!r} takes no options, and {sorted(options)} were given.",
                "Leave them out.",
            )

    def _prepared(self) -> nn.Module:
        if self._module is None:
            raise ConfigurationError(
                f"The strategy {self.name!r} was asked for its state before it had a module.",
                "Call prepare(module) first.",
            )
        return self._module

    def _make_whole(self, module: nn.Module) -> None:
        """Gather what an earlier strategy divided, and this one wants whole."""
        divided = [p for p in module.parameters() if hasattr(p, "device_mesh")]
        if "_drivetrain_stages" in vars(module):
            from drivetrain_toolkit.strategies import stages

            if not stages.make_whole(module, self.context):
                raise ConfigurationError(
                    f"{type(module).__name__} holds one rank's layers from a run with 'pipeline' "
                    f"in another world than this of {self.context.world.size}.",
                    "Load the run's checkpoint into a new module.",
                )
        if not divided:
            return
        earlier = max(p.device_mesh.size() for p in divided)
        if self.context.world.size != earlier:
            raise ConfigurationError(
                f"{type(module).__name__} holds one rank's parts from a run of "
                f"{earlier} processes, and the strategy {self.name!r} has "
                f"{self.context.world.size}, so that the others cannot send theirs.",
                "Load the run's checkpoint into a new module.",
            )
        from drivetrain_toolkit.strategies.units import make_whole

        make_whole(module)

    def _with_sync_batchnorm(self, module: nn.Module) -> nn.Module:
        if self.device.type in _NO_SYNC_BATCHNORM:
            raise UnsupportedError(
                "Batch statistics over all processes were asked for, which torch does not offer on "
                f"{self.device.type!r} devices.",
                "Set sync_batchnorm=False, or use group or layer normalization.",
            )
        if self.context.world.size == 1:
            return module  # its statistics are all there are
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted


class Gathering(Protocol):
    """What makes a module whole on every rank, and divides it again. Every rank calls both."""

    def gather(self) -> None:
        """Make it whole."""
        ...

    def scatter(self) -> None:
        """Keep this rank's part."""
        ...


class WholeEvalStep(EagerEvalStep):
    """Evaluation with a whole module on every rank between entering and leaving."""

    __slots__ = ("_divided",)

    def __init__(self, spec: EvalSpec, precision: Precision, divided: Gathering) -> None:
        super().__init__(spec, precision)
        self._divided = divided

    def __enter__(self) -> Self:
        self._divided.gather()
        return self

    def __exit__(self, *exc: object) -> None:
        self._divided.scatter()


class SingleDeviceStrategy(EagerStrategy):
    """One process, one device, no wrapper."""

    name = "single_device"

    def __call__(self, context: StrategyContext) -> Self:
        """A bound copy. Raises ``UnsupportedError`` in a world of several processes."""
        if context.world.size > 1:
            raise UnsupportedError(
                f"The strategy 'single_device' was asked for in a world of {context.world.size}, "
                "whose models it would not keep equal.",
                "Use 'ddp', or start one process.",
            )
        return super().__call__(context)


def with_options(name: str, options: T, given: Mapping[str, Any]) -> T:
    """A strategy's options with some replaced.

    Args:
        name: The strategy's, for messages.
        options: A dataclass.
        given: Values by name.

    Raises:
        ConfigurationError: It takes no option of that name.
    """
    known = [item.name for item in fields(options)]
    if not given.keys() <= set(known):
        raise ConfigurationError(
            f"The strategy {name!r} was given the options {sorted(given)}; it takes "
            f"{sorted(known)}.",
            "Leave out the others.",
        )
    return replace(options, **given)


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, in place; a parameter that has several names stays one.

    Where tensors of the device cannot take the place of those that were there, torch makes new
    parameters, one for each name.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    module = module.to(device)
    for first, *others in names.values():
        for other in others:
            owner, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(owner), attribute, module.get_parameter(first))
    return module


def broadcast_module(module: nn.Module, collectives: Collectives) -> None:
    """Give every rank the parameters and buffers of rank 0, in place."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(collectives.broadcast(tensor.detach()))
