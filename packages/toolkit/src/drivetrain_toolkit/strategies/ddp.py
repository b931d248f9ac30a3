"""Distributed data parallel: every process holds the whole module, and gradients are averaged."""

from __future__ import annotations

import inspect
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from drivetrain_interfaces import ConfigurationError, ModelState, UnsupportedError, UserCodeError
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drivetrain_toolkit.averaging import mean_over
from drivetrain_toolkit.checks import needs_closure
from drivetrain_toolkit.state import gather_module, gather_optimizer, restore_optimizers
from drivetrain_toolkit.steps import EagerTrainStep, make_train_step
from drivetrain_toolkit.strategies.eager import EagerStrategy, broadcast_module, with_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from drivetrain_interfaces import ManualSpec, ManualStep, StepSpec, TrainStep

    from drivetrain_toolkit.steps import Update
    from drivetrain_toolkit.strategies.local_sgd import LocalSGD

#: Newer versions of torch have another name for it, and warn about the older one.
_BUFFERS_ARGUMENT = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


@dataclass(frozen=True)
class DDPOptions:
    """The options of ``DDPStrategy``, as one value."""

    find_unused_parameters: bool
    static_graph: bool
    gradient_as_bucket_view: bool
    bucket_cap_mb: float | None
    broadcast_buffers: bool
    comm_hook: Callable[[Any, Any], Any] | None
    comm_state: Any
    averaging_period: int | None
    averaging_start: int
    averaging_group: int | None
    uneven_inputs: bool


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
        averaging_period: Ranks average parameters once in so many windows, instead of gradients in
            each (post-local SGD); 2 or more. None means gradients in each.
        averaging_start: Windows at the beginning in which gradients are averaged all the same.
        averaging_group: Ranks that average gradients in every window also afterwards, 1 for none.
            None means those of a machine, or none if there is only one.
        uneven_inputs: Ranks may train on different numbers of windows between entering and leaving
            the train step. A gradient is the mean over the ranks that still train; at the end all
            take over what the last one has.
    """

    name = "ddp"
    #: Whether every rank can update all of its parameters by itself.
    _can_part: ClassVar[bool] = True

    _options: Any
    _model: Any = None
    _loss: _LossModule | None = None
    _step: EagerTrainStep | None = None
    _averaging: LocalSGD | None = None

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
        averaging_period: int | None = None,
        averaging_start: int = 0,
        averaging_group: int | None = None,
        uneven_inputs: bool = False,
    ) -> None:
        self._options = DDPOptions(
            find_unused_parameters,
            static_graph,
            gradient_as_bucket_view,
            bucket_cap_mb,
            broadcast_buffers,
            comm_hook,
            comm_state,
            averaging_period,
            averaging_start,
            averaging_group,
            uneven_inputs,
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
            broadcast_module(module, self.context.collectives)
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Wrap, and build the train step. A step that was built before cannot be called any more.

        Raises:
            UserCodeError: ``configure_ddp`` was overridden and set no usable wrapper.
            UnsupportedError: A static graph was asked for together with weighted accumulation,
                averaging of parameters with an optimizer that needs a closure, or uneven inputs
                with what a rank without batches cannot take part in.
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
        if self._options.averaging_period is not None:
            self._averaging = self._local_sgd(spec)
        if self._options.uneven_inputs:
            from drivetrain_toolkit.strategies.uneven import check_uneven

            check_uneven(spec, self.name)
        self._optimizers = tuple(spec.optimizers)
        self._loss = _LossModule(spec.module, spec.loss)
        self.configure_ddp()
        wrapper = self._checked_wrapper()
        self._step = make_train_step(
            spec,
            self.context.precision,
            forward=partial(_unused_by_name, wrapper, self.name),
            no_sync=self._no_sync(spec, wrapper),
            collectives=self.context.collectives,
            world_size=world.size,
            update=self._update(spec),
        )
        if self._averaging is not None:
            return self._averaging.around(self._step, self._average)
        if self._options.uneven_inputs:
            return self._uneven(spec, wrapper, self._step)
        return self._step

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step. It averages gradients at each update and needs no wrapper."""
        self._release()
        if self._options.averaging_period is not None:
            raise UnsupportedError(
                f"averaging_period={self._options.averaging_period} was asked for together with a "
                "manual step, which averages gradients at each update.",
                "Leave it out, or use automatic optimization.",
            )
        return super().manual_step(spec)

    def state(self) -> ModelState:
        """The whole state, on every rank; the mean over ranks while they differ."""
        if self._averaging is None:
            return super().state()
        module = self._prepared()
        mean = partial(mean_over, self.context.collectives)
        optimizers = [gather_optimizer(each, module, whole=mean) for each in self._optimizers]
        self._averaging.note(optimizers)
        return ModelState(
            module=gather_module(module, whole=mean),
            optimizers=optimizers,
            precision=self.context.precision.state_dict(),
        )

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state, and how far the period of averaging was.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        super().load(state, strict=strict)
        if self._averaging is not None:
            self._averaging.read(state.optimizers)

    def close(self) -> None:
        """Drop the wrapper, whose hooks go with it, and release the device."""
        self._release()
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        self._options = with_options(self.name, self._options, options)

    def _check(self) -> None:
        super()._check()
        options = self._options
        if options.uneven_inputs:
            self._check_uneven()
        if options.averaging_period is not None:
            self._check_averaging()
        elif options.averaging_start or options.averaging_group is not None:
            raise ConfigurationError(
                f"averaging_start={options.averaging_start} and "
                f"averaging_group={options.averaging_group} were asked of the strategy "
                f"{self.name!r} without averaging_period.",
                "Give averaging_period, or leave out both.",
            )

    def _check_uneven(self) -> None:
        options = self._options
        others = ("averaging_period", "comm_hook", "static_graph")
        besides = [each for each in others if getattr(options, each)]
        if besides or not self._can_part:
            raise ConfigurationError(
                f"uneven_inputs=True was asked of the strategy {self.name!r}"
                + (f" besides {listed(besides)}" if besides else "")
                + ", in which a rank without batches cannot stand in.",
                "Use it with 'ddp', and without averaging, hooks and static graphs.",
            )

    def _check_averaging(self) -> None:
        options, world, precision = self._options, self.context.world, self.context.precision
        group = self._averaging_group()
        if options.averaging_period < 2 or options.averaging_start < 0:  # noqa: PLR2004 - as it says
            raise ConfigurationError(
                f"averaging_period={options.averaging_period} and "
                f"averaging_start={options.averaging_start} were asked of the strategy "
                f"{self.name!r}.",
                "Give a period of 2 or more, a start of 0 or more, or leave out both.",
            )
        if world.size > 1 and (group < 1 or world.size % group or group == world.size):
            raise ConfigurationError(
                f"averaging_group={group} was asked of the strategy {self.name!r} in a world of "
                f"{world.size}.",
                f"Use a divisor of {world.size} that is smaller, such as 1.",
            )
        if options.comm_hook is not None:
            raise ConfigurationError(
                f"averaging_period and comm_hook were both asked of the strategy {self.name!r}, "
                "and both say how gradients are reduced.",
                "Keep one of them.",
            )
        if not self._can_part or precision.policy.loss_scaling:
            with_what = f" in precision {precision.name!r}" if self._can_part else ""
            raise UnsupportedError(
                f"averaging_period={options.averaging_period} was asked of the strategy "
                f"{self.name!r}{with_what}, in which ranks cannot update on their own.",
                "Use 'ddp' and a precision without a loss scale.",
            )

    def _averaging_group(self) -> int:
        asked: int | None = self._options.averaging_group
        if asked is not None:
            return asked
        world = self.context.world
        return 1 if world.local_size == world.size else world.local_size

    def _local_sgd(self, spec: StepSpec) -> LocalSGD:
        from drivetrain_toolkit.strategies.local_sgd import LocalSGD

        options = self._options
        for optimizer in spec.optimizers:
            if needs_closure(optimizer):
                raise UnsupportedError(
                    f"averaging_period={options.averaging_period} was asked of the strategy "
                    f"{self.name!r} with {type(optimizer).__name__}, which evaluates the loss "
                    "itself.",
                    "Leave it out, or use another optimizer.",
                )
        return LocalSGD(options.averaging_period, options.averaging_start, self._averaging_group())

    def _average(self) -> None:
        """Make ranks equal: each takes the mean of all."""
        with torch.no_grad():
            for tensor in (*self._prepared().parameters(), *self._prepared().buffers()):
                tensor.copy_(mean_over(self.context.collectives, tensor.detach()))

    def _uneven(self, spec: StepSpec, wrapper: Any, step: EagerTrainStep) -> TrainStep:
        from drivetrain_toolkit.strategies.uneven import UnevenStep, torchs_own

        wrapper = torchs_own(wrapper, self.name)
        module, precision, optimizers = spec.module, self.context.precision, self._optimizers

        def save() -> Any:
            return [gather_optimizer(each, module) for each in optimizers], precision.state_dict()

        def load(saved: Any) -> None:
            restore_optimizers(optimizers, module, saved[0])
            precision.load_state_dict(saved[1])

        return UnevenStep(step, wrapper, self.context.collectives, save, load)

    def _update(self, spec: StepSpec) -> Update | None:
        """How the optimizers update, if not as the precision does it."""
        if self._averaging is not None:
            return self._averaging.updating(self.context.precision.step)
        return None

    def _checked_wrapper(self) -> Any:
        wrapper = self._model
        if not callable(wrapper) or not hasattr(wrapper, "no_sync"):
            raise UserCodeError(
                f"{type(self).__name__}.configure_ddp left a {type(wrapper).__name__} in "
                "self._model, not a wrapper with no_sync().",
                "Set self._model to a DistributedDataParallel around self.model.",
            )
        if self._averaging is not None:
            self._averaging.register(wrapper)
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
        self._step = self._model = self._loss = self._averaging = None


def _unused_by_name(wrapper: Any, owner: str, microbatch: Any) -> Tensor:
    """The loss; torch tells of parameters that the last one did not reach by their numbers."""
    try:
        loss: Tensor = wrapper(microbatch)
    except RuntimeError as error:
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if found is None:
            raise
        names = [name for name, p in wrapper.named_parameters() if p.requires_grad]
        unused = [names[int(n)].removeprefix("module.module.") for n in found[1].split()]
        raise UserCodeError(
            f"The last loss did not depend on {listed(unused)} on this rank, and the strategy "
            f"{owner!r} expects that each loss depends on all parameters.",
            "Freeze what is not used, or set find_unused_parameters=True.",
        ) from error
    return loss


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
