"""Parameters, gradients and optimizer state divided over ranks (FSDP2; ZeRO stages 2 and 3)."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from drivetrain_toolkit.precision import _CastInputs, _install_cast
from drivetrain_toolkit.rows import Gathered, GatheringStep
from drivetrain_toolkit.shards import (
    Shards,
    part_of,
    shared_update,
)
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.steps import EagerEvalStep, EagerTrainStep, make_train_step
from drivetrain_toolkit.strategies.divided import DividedStrategy
from drivetrain_toolkit.strategies.eager import moved, with_options
from drivetrain_toolkit.strategies.plans import (
    SameDraws,
    Settled,
    divide,
    refuse_ties,
    styles_of,
)
from drivetrain_toolkit.strategies.units import (
    Root,
    checkpoint_activations,
    chosen,
    keep_activations,
    materialize,
    place,
    refuse_ties_across,
    spread_from_main,
    unsynced,
    unwrap,
    without_casts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        Precision,
        StepSpec,
        TrainStep,
    )
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer
    from typing_extensions import Self

    from drivetrain_toolkit.strategies.plans import Installed, Plan
    from drivetrain_toolkit.strategies.units import Wanted


@dataclass(frozen=True)
class FSDPOptions:
    """The options of ``FSDPStrategy``, as one value."""

    wrap: Wanted | None
    reshard_after_forward: bool | int
    mixed_precision: MixedPrecisionPolicy | None
    cpu_offload: bool
    activation_checkpointing: Wanted | bool
    shards: int | None
    unused_parameters: bool
    plan: Plan | None
    plan_ranks: int | None


class FSDPStrategy(DividedStrategy):
    """Several processes, each with a part of every parameter, its gradient and optimizer state.

    Parameters of one unit are gathered when it is used. In a world of one nothing is divided.

    Args:
        wrap: The units: names, classes, or a function of a module. None means the elements of each
            ``ModuleList``; what is in no unit forms one together.
        reshard_after_forward: Free gathered parameters after forward, and gather them again in
            backward. A number keeps parts over so many ranks in between.
        mixed_precision: What gathered parameters and reduced gradients are made of, instead of what
            they are stored in. Inputs are cast where they meet parameters.
        cpu_offload: Parts wait on the host, where the optimizer updates them.
        activation_checkpointing: Units, or those that are named as for ``wrap``, make their
            activations again in backward.
        shards: Ranks that share one copy; None means all. With fewer, copies are kept equal.
        unused_parameters: Ranks may use different parameters in a step.
        plan: Single layers are divided besides, and the work in them, as in
            ``TensorParallelStrategy``.
        plan_ranks: Neighbouring ranks that share what the plan divides, and one batch.
    """

    name = "fsdp"
    capabilities: ClassVar = CAPABILITIES["fsdp"]
    _reshard: ClassVar[bool] = True

    _root: Root | None = None
    _units: tuple[FSDPModule, ...] = ()
    _step: EagerTrainStep | None = None
    _casts: frozenset[int] = frozenset()
    _mesh: DeviceMesh | None = None
    _layers: Installed | None = None
    _sharing: ProcessGroup | None = None

    def __init__(
        self,
        *,
        wrap: Wanted | None = None,
        reshard_after_forward: bool | int | None = None,
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: Wanted | bool = False,
        shards: int | None = None,
        unused_parameters: bool = False,
        plan: Plan | None = None,
        plan_ranks: int | None = None,
    ) -> None:
        self._options = FSDPOptions(
            wrap,
            self._reshard if reshard_after_forward is None else reshard_after_forward,
            mixed_precision,
            cpu_offload,
            activation_checkpointing,
            shards,
            unused_parameters,
            plan,
            plan_ranks,
        )

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, take over rank 0's values, and divide, unit by unit, in place.

        A module on the ``meta`` device gets memory and values here, one unit at a time.

        Raises:
            ConfigurationError: ``wrap`` or the plan names nothing, or a module cannot make its
                values.
            UnsupportedError: Units share a parameter, or the plan cannot divide a layer.
        """
        self._release()
        unwrap(module)
        keep_activations(module)
        self._make_whole(module)
        if self.context.world.size == 1:
            materialize(module, (), self.device, initialize=True)
            module = super().prepare(module)
            self._checkpoint(module, ())
            return module
        module = self.context.precision.convert(module)
        if self.context.sync_batchnorm:
            module = self._with_sync_batchnorm(module)
        units = chosen(module, self._options.wrap, f"wrap of the strategy {self.name!r}")
        refuse_ties_across(module, units, self.name)
        self._cast_inputs(module)
        root = Root(module)
        done: set[int] = set()
        if self._options.plan is not None:
            self._divide_layers(module, self._options.plan)
            done = {id(part) for part in module.modules()}
        for unit in (*units, root):
            self._divide(unit, done, root=unit is root)
        self._checkpoint(module, units)
        self._module = module
        self._root = root
        self._units = tuple(part for part in root.modules() if isinstance(part, FSDPModule))
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            ConfigurationError: An optimizer was built before ``prepare``.
            UnsupportedError: An optimizer needs a closure.
        """
        self._refuse_closures(spec)
        if self._root is None:
            return super().train_step(spec)
        self._refuse_foreign(spec)
        if self._step is not None:
            self._step.release()
        self._optimizers = tuple(spec.optimizers)
        forward: Callable[[Any], Tensor] = partial(self._forward, self._root, spec.loss)
        update = shared_update(self.context.precision, None)
        if self._layers is not None:
            forward = SameDraws(forward, self.device, self._sharing)
            update = Settled(update, spec, self.name)
        self._step = make_train_step(
            spec,
            self.context.precision,
            forward=forward,
            no_sync=partial(unsynced, self._units),
            collectives=self.context.collectives,
            world_size=self.context.world.size,
            update=update,
            parts=_Parts(self._units),
        )
        if self._layers is None:
            return self._step
        return GatheringStep(self._step, Gathered(self._sharing, self.name))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Entering it gathers all parameters, so all ranks enter it.

        Between that and leaving it no rank waits for another, however many batches each has.
        """
        if self._root is None:
            return super().eval_step(spec)
        return _GatheredEvalStep(
            spec, self.context.precision, self._root, self._units, self._modes, self._layers
        )

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def close(self) -> None:
        """Take the hooks away and release the device. The module keeps this rank's parts.

        The next ``prepare`` makes it whole; until then, using it raises an error.
        """
        self._release()
        super().close()

    @staticmethod
    def _forward(root: Root, loss: Callable[..., Tensor], microbatch: Any) -> Tensor:
        return cast("Tensor", root(loss, microbatch))

    def _is_divided(self) -> bool:
        return self._root is not None

    def _held(self) -> nn.Module:
        for unit in self._units:
            unit.reshard()
        return super()._held()

    def _configure(self, options: Mapping[str, Any]) -> None:
        self._options = with_options(self.name, self._options, options)

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()
        size = self.context.world.size
        shards = self._options.shards
        if shards is not None and (shards < 1 or size % shards):
            raise ConfigurationError(
                f"shards={shards} was asked of the strategy {self.name!r} in a world of {size}, "
                "which it does not divide.",
                f"Use a divisor of {size}, or None for all ranks.",
            )
        self._check_plan(size)
        if self._options.cpu_offload and self.device.type == "cpu":
            raise UnsupportedError(
                f"cpu_offload=True was asked of the strategy {self.name!r}, and the devices are "
                "the host itself.",
                "Leave it out.",
            )
        self._refuse_other_collectives()

    def _check_plan(self, size: int) -> None:
        options = self._options
        plan, ranks = options.plan, options.plan_ranks
        other = options.shards is not None or options.cpu_offload
        if (plan is None) != (ranks is None) or (plan is not None and other):
            raise ConfigurationError(
                f"plan, plan_ranks={ranks}, shards={options.shards} and "
                f"cpu_offload={options.cpu_offload} were asked of the strategy {self.name!r}; it "
                "takes plan and plan_ranks together, and without the others.",
                "Give both of them, or neither.",
            )
        if ranks is not None and size > 1 and (ranks < 1 or size % ranks or ranks == size):
            raise ConfigurationError(
                f"plan_ranks={ranks} was asked of the strategy {self.name!r} in a world of {size}.",
                f"Use a divisor of {size} that is smaller; 'tp' divides layers over all ranks.",
            )

    def _divide_layers(self, module: nn.Module, plan: Plan) -> None:
        """Divide what the plan names over neighbouring ranks; units are then divided over rows."""
        ranks = self._options.plan_ranks
        assert ranks is not None
        styles = styles_of(plan, module, self.name)
        refuse_ties(module, styles, self.name)
        materialize(module, (), self.device, initialize=self.context.world.is_main)
        moved(module, self.device)
        spread_from_main(module, (), self.context.collectives)
        shape = (self.context.world.size // ranks, ranks)
        both = init_device_mesh(self.device.type, shape, mesh_dim_names=("shard", "tp"))
        self._mesh = both["shard"]
        self._sharing = both["tp"].get_group()
        self._layers = divide(module, styles, both["tp"], self.name)

    def _make_mesh(self) -> DeviceMesh:
        size = self.context.world.size
        shards = self._options.shards
        kind = self.device.type
        if shards is None or shards == size:
            return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("copy", "shard"))

    def _divide(self, unit: nn.Module, done: set[int], *, root: bool) -> None:
        if self._mesh is None:
            self._mesh = self._make_mesh()
        materialize(unit, done, self.device, initialize=self.context.world.is_main)
        place(unit, done, self.device)
        spread_from_main(unit, done, self.context.collectives)
        options = self._options
        fully_shard(
            unit,
            mesh=self._mesh,
            reshard_after_forward=self._modes(root=root),
            mp_policy=options.mixed_precision or MixedPrecisionPolicy(cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy(),
        )
        if self.device.type != "cpu":
            _only_sums(unit)
        if options.unused_parameters:
            _allow_unused(unit)
        done |= {id(part) for part in unit.modules()}

    def _modes(self, *, root: bool) -> bool | int:
        """What happens after forward: backward begins with the root, so that one stays whole."""
        return False if root else self._options.reshard_after_forward

    def _cast_inputs(self, module: nn.Module) -> None:
        policy = self._options.mixed_precision
        if policy is None or policy.param_dtype is None:
            return
        self._casts = frozenset(
            id(hook)
            for part in module.modules()
            for hook in part._forward_pre_hooks.values()  # noqa: SLF001 - torch has no way to list them
            if isinstance(hook, _CastInputs)
        )
        for part in module.modules():
            if any(p.is_floating_point() for p in part.parameters(recurse=False)):
                _install_cast(part, policy.param_dtype)

    def _checkpoint(self, module: nn.Module, units: Sequence[nn.Module]) -> None:
        wanted = self._options.activation_checkpointing
        if wanted is False:
            return
        setting = f"activation_checkpointing of the strategy {self.name!r}"
        if wanted is True:
            units = units or chosen(module, self._options.wrap, setting)
            if not units:
                raise ConfigurationError(
                    f"activation_checkpointing=True was asked of the strategy {self.name!r}, and "
                    f"{type(module).__name__} has no units.",
                    "Name the modules: activation_checkpointing=[Block].",
                )
        else:
            units = chosen(module, wanted, setting)
        checkpoint_activations(units)

    def _release(self) -> None:
        if self._step is not None:
            self._step.release()
        if self._root is not None:
            unwrap(self._root)
            keep_activations(self._root)
            if self._options.mixed_precision is not None:
                without_casts(self._root, self._casts)
            if self._layers is not None:
                self._layers.remove()
            gc.collect()  # torch keeps units in cycles, and with them what they had gathered
        self._step = self._root = self._mesh = self._layers = self._sharing = None
        self._units = ()


class Zero2Strategy(FSDPStrategy):
    """As ``FSDPStrategy``, with parameters that stay gathered from forward to backward.

    Gradients and optimizer state are divided; parameters are, between steps.
    """

    name = "zero2"
    capabilities: ClassVar = CAPABILITIES["zero2"]
    _reshard: ClassVar[bool] = False


class _Parts(Shards):
    """Gradients of FSDP: while a window accumulates, torch keeps them whole and out of sight."""

    def __init__(self, units: Sequence[FSDPModule]) -> None:
        super().__init__()
        self._units = units

    def pending(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """The gradients of this rank alone, which torch keeps until the last backward."""
        found = []
        for unit in self._units:
            for group in unit._get_fsdp_state()._fsdp_param_groups:  # noqa: SLF001 - torch has no way to reach them
                for held in group.fsdp_params:
                    grad = held.unsharded_accumulated_grad
                    if grad is None and hasattr(held, "_unsharded_param"):
                        grad = held._unsharded_param.grad  # noqa: SLF001
                    if grad is not None:
                        found.append(part_of(grad))
        return found


class _GatheredEvalStep(EagerEvalStep):
    """Evaluation with all parameters gathered between entering and leaving."""

    __slots__ = ("_layers", "_modes", "_root", "_units")

    def __init__(
        self,
        spec: EvalSpec,
        precision: Precision,
        root: Root,
        units: Sequence[FSDPModule],
        modes: Callable[..., bool | int],
        layers: Installed | None,
    ) -> None:
        super().__init__(spec, precision)
        self._layers = layers
        self._root = root
        self._units = units
        self._modes = modes
        self._function = partial(root, spec.function)

    def __enter__(self) -> Self:
        # Torch does it at the first forward, which may be this one.
        cast("FSDPModule", self._root)._get_fsdp_state()._lazy_init()  # noqa: SLF001
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        if self._layers is not None:
            self._layers.gather()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._layers is not None:
            self._layers.scatter()
        for unit in self._units:
            mode = self._modes(root=unit is cast("FSDPModule", self._root))
            unit.set_reshard_after_forward(bool(mode), recurse=False)
            unit.reshard()


def _only_sums(unit: nn.Module) -> None:
    """Let ranks add gradients and divide: the collectives of many devices have no average."""
    only = getattr(unit, "set_force_sum_reduction_for_comms", None)
    if only is not None:  # older versions of torch average wherever the backend can
        only(True)  # noqa: FBT003 - torch's signature


def _allow_unused(unit: nn.Module) -> None:
    allow = getattr(unit, "set_reduce_scatter_unused_params", None)
    if allow is None:
        raise UnsupportedError(
            f"unused_parameters=True was asked for, which torch {torch.__version__} does not offer "
            "for sharded modules.",
            "Upgrade torch, or use 'ddp' with find_unused_parameters=True.",
        )
    allow(True, recurse=False)  # noqa: FBT003 - torch's signature
