"""How a module is placed, wrapped and stepped. The rules are in docs/contracts/strategy.md.

A strategy object is a factory: calling it with a ``StrategyContext`` returns a copy that is bound
to this process. So an object made by the user, also of a subclass, can be passed around and pickled
before there is any device.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from drivetrain_interfaces import (
    ConfigurationError,
    ModelState,
    UnsupportedError,
    UserCodeError,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)
from drivetrain_toolkit.steps import (
    EagerEvalStep,
    EagerManualStep,
    EagerTrainStep,
    make_train_step,
)
from drivetrain_toolkit.trees import move

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from drivetrain_interfaces import (
        Collectives,
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from typing_extensions import Self

#: Newer versions of torch have another name for it, and warn about the older one.
_BUFFERS_ARGUMENT = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)

#: Device types whose tensors torch's ``SyncBatchNorm`` refuses.
_NO_SYNC_BATCHNORM = frozenset({"cpu", "mps"})


class EagerStrategy:
    """What strategies with an eager step share. Subclass one of those below, or this one."""

    name: ClassVar[str] = "eager"

    _bound: StrategyContext | None = None
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
        module = self.context.precision.convert(module)
        if self.context.sync_batchnorm:
            module = self._with_sync_batchnorm(module)
        self._module = _moved(module, self.device)
        return self._module

    def feed(self, batch: Any) -> Any:
        """The batch on the device; the same object if it is there already."""
        return move(batch, self._device)

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

    def _with_sync_batchnorm(self, module: nn.Module) -> nn.Module:
        if self.device.type in _NO_SYNC_BATCHNORM:
            raise UnsupportedError(
                "Batch statistics over all processes were asked for, which torch does not offer on "
                f"{self.device.type!r} devices.",
                "Set sync_batchnorm=False, or use group or layer normalization.",
            )
        return module  # one process: its statistics are all there are


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


@dataclass(frozen=True)
class _DDPOptions:
    find_unused_parameters: bool
    static_graph: bool
    gradient_as_bucket_view: bool
    bucket_cap_mb: float | None
    broadcast_buffers: bool
    comm_hook: Callable[[Any, Any], Any] | None
    comm_state: Any


class DDPStrategy(EagerStrategy):
    """Several processes, one device each, gradients averaged while backward still runs.

    To use another wrapper, subclass it and override ``configure_ddp``. In a world of one nothing is
    wrapped.

    Args:
        find_unused_parameters: Look for parameters that a loss does not reach, in every step.
        static_graph: The graph is the same in every step, which allows torch to do more.
        gradient_as_bucket_view: Gradients are views into the buckets, which saves memory.
        bucket_cap_mb: Megabytes that are reduced at once; None is torch's choice.
        broadcast_buffers: Rank 0's buffers go to all ranks before each forward.
        comm_hook: What reduces a bucket instead of the average, as for ``register_comm_hook``.
        comm_state: The first argument of ``comm_hook``.
    """

    name = "ddp"

    _model: Any = None
    _loss: _LossModule | None = None
    _step: EagerTrainStep | None = None

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        comm_hook: Callable[[Any, Any], Any] | None = None,
        comm_state: Any = None,
    ) -> None:
        self._options = _DDPOptions(
            find_unused_parameters,
            static_graph,
            gradient_as_bucket_view,
            bucket_cap_mb,
            broadcast_buffers,
            comm_hook,
            comm_state,
        )

    @property
    def model(self) -> nn.Module:
        """What is to be wrapped: a module whose forward takes a microbatch and returns its loss."""
        if self._loss is None:
            raise ConfigurationError(
                f"{type(self).__name__}.model was read before there was a train step.",
                "Read it in configure_ddp.",
            )
        return self._loss

    @property
    def device_ids(self) -> list[int] | None:
        """For a wrapper that asks for it: this process's device, or None if devices have no index.

        Not needed: batches are on the device before the wrapper sees them.
        """
        index = self.device.index
        return None if index is None else [index]

    @property
    def ddp_kwargs(self) -> dict[str, Any]:
        """The options of this strategy as arguments for torch's wrapper."""
        options = self._options
        return {
            "find_unused_parameters": options.find_unused_parameters,
            "static_graph": options.static_graph,
            "gradient_as_bucket_view": options.gradient_as_bucket_view,
            "bucket_cap_mb": options.bucket_cap_mb,
            _BUFFERS_ARGUMENT: options.broadcast_buffers,
        }

    def configure_ddp(self) -> None:
        """Set ``self._model`` to a wrapper of ``self.model``. Override it to use another one.

        The wrapper is called with a microbatch, returns the loss, and has ``no_sync()``.
        """
        self._model = DistributedDataParallel(self.model, **self.ddp_kwargs)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move, and take over the parameters and buffers of rank 0, in place.

        Raises:
            UnsupportedError: Synchronized batch normalization was asked for and the device cannot.
        """
        self._release()
        module = super().prepare(module)
        if self.context.world.size > 1:
            _broadcast_module(module, self.context.collectives)
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Wrap, and build the train step. A step that was built before cannot be called any more.

        Raises:
            UserCodeError: ``configure_ddp`` was overridden and set no usable wrapper.
            UnsupportedError: A static graph was asked for together with weighted accumulation.
        """
        self._release()
        world = self.context.world
        if world.size == 1:
            if type(self).configure_ddp is not DDPStrategy.configure_ddp or self._options.comm_hook:
                warnings.warn(
                    f"{type(self).__name__} wraps nothing in a world of one process: "
                    "configure_ddp and comm_hook are not called.",
                    stacklevel=2,
                )
            return super().train_step(spec)
        self._optimizers = tuple(spec.optimizers)
        self._loss = _LossModule(spec.module, spec.loss)
        self.configure_ddp()
        wrapper = self._checked_wrapper()
        self._step = make_train_step(
            spec,
            self.context.precision,
            forward=wrapper,
            no_sync=self._no_sync(spec, wrapper),
            collectives=self.context.collectives,
            world_size=world.size,
        )
        return self._step

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step. It averages gradients at each update and needs no wrapper."""
        self._release()
        return super().manual_step(spec)

    def close(self) -> None:
        """Drop the wrapper, whose hooks go with it, and release the device."""
        self._release()
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        try:
            self._options = replace(self._options, **options)
        except TypeError as error:
            raise ConfigurationError(
                f"The strategy {self.name!r} was given the options {sorted(options)}; it takes "
                f"{sorted(item.name for item in fields(self._options))}.",
                "Leave out the others.",
            ) from error

    def _checked_wrapper(self) -> Any:
        wrapper = self._model
        if not callable(wrapper) or not hasattr(wrapper, "no_sync"):
            raise UserCodeError(
                f"{type(self).__name__}.configure_ddp left a {type(wrapper).__name__} in "
                "self._model, not a wrapper with no_sync().",
                "Set self._model to a DistributedDataParallel around self.model.",
            )
        if self._options.comm_hook is not None:
            wrapper.register_comm_hook(self._options.comm_state, self._options.comm_hook)
        return wrapper

    def _no_sync(self, spec: StepSpec, wrapper: Any) -> Callable[[], AbstractContextManager[Any]]:
        if not self._options.static_graph or spec.accumulate == 1:
            no_sync: Callable[[], AbstractContextManager[Any]] = wrapper.no_sync
            return no_sync
        if spec.weight is not None:
            raise UnsupportedError(
                "static_graph=True was asked for together with accumulation by weight, which "
                "need different first backward passes.",
                "Leave static_graph out, or accumulate without weights.",
            )
        return _AllButFirst(wrapper.no_sync)

    def _release(self) -> None:
        """Drop every reference to the wrapper: its hooks live exactly as long as it does."""
        if self._step is not None:
            self._step.release()
        self._step = self._model = self._loss = None

    def _with_sync_batchnorm(self, module: nn.Module) -> nn.Module:
        module = super()._with_sync_batchnorm(module)
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted


class _LossModule(nn.Module):
    """The user's module and loss function as one module, so that a wrapper sees one forward."""

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._function = loss

    def forward(self, microbatch: Any) -> Tensor:
        return self._function(self.module, microbatch)


class _AllButFirst:
    """Torch records a static graph in a backward that reduces, so the very first one must.

    What it reduced is equal on all ranks and passes unchanged through the window's own reduction.
    """

    def __init__(self, no_sync: Callable[[], AbstractContextManager[Any]]) -> None:
        self._no_sync = no_sync
        self._first = True

    def __call__(self) -> AbstractContextManager[Any]:
        if self._first:
            self._first = False
            return nullcontext()
        return self._no_sync()


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
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


def _broadcast_module(module: nn.Module, collectives: Collectives) -> None:
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(collectives.broadcast(tensor.detach()))
