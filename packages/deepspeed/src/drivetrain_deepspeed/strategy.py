"""The strategy: a module is placed, handed to an engine, and its state gathered from there."""

from __future__ import annotations

import logging
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import (
    CheckpointError,
    ConfigurationError,
    ModelState,
    UnsupportedError,
)
from drivetrain_toolkit.checks import check_spec, needs_closure
from drivetrain_toolkit.state import gather_optimizer, restore_optimizers
from drivetrain_toolkit.strategies import EagerStrategy
from drivetrain_toolkit.strategies.eager import moved
from torch import nn

from drivetrain_deepspeed.building import (
    built_divided,
    check_built,
    divide_layer_by_layer,
    dividing,
    fill,
    has_no_values,
)
from drivetrain_deepspeed.config import Merged, Options, Wanted, complete, read
from drivetrain_deepspeed.discard import discard
from drivetrain_deepspeed.engine import (
    Connection,
    LossModule,
    check_nvme,
    destroy,
    import_deepspeed,
    make_engine,
)
from drivetrain_deepspeed.evaluation import GatheredEvalStep
from drivetrain_deepspeed.native import check_fits, check_trusted, find, mend_universal
from drivetrain_deepspeed.shards import Groups, Partitions, is_divided, whole_parameter
from drivetrain_deepspeed.state import (
    module_state,
    names_by_group,
    optimizer_state,
    restore_module_state,
    restore_optimizer_state,
)
from drivetrain_deepspeed.step import EngineStep

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import ModuleType

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from typing_extensions import Self

_LOG = logging.getLogger(__name__)
_DIVIDED = 3
_HALF = frozenset({"float16", "bfloat16"})


class DeepSpeedStrategy(EagerStrategy):
    """Training by DeepSpeed's engine, which owns backward, clipping, accumulation and the update.

    Args:
        stage: 0 divides nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too.
            None is what ``config`` says, or 2.
        options: See ``Options``: ``offload_optimizer="cpu"``, ``config="ds.json"`` and others.

    Raises:
        ConfigurationError: Options that contradict each other or ``config``; all are listed.
    """

    name = "deepspeed"

    _deepspeed: ModuleType
    _connection: Connection | None = None
    _engine: Any = None
    _step: EngineStep | None = None
    _shards: Groups | Partitions | None = None
    _names: list[list[str]] | None = None

    def __init__(self, stage: int | None = None, **options: Any) -> None:
        try:
            self.options = Options(stage=stage, **options)
        except TypeError as error:
            raise _unknown_options(options) from error
        self._merged = read(self.options)

    def __call__(self, context: StrategyContext) -> Self:
        """A copy that is bound to this process and its device.

        Raises:
            UnsupportedError: The device or DeepSpeed cannot do what was asked for.
            UnavailableError: DeepSpeed is not installed.
            ClusterError: The processes are not connected as DeepSpeed needs them.
        """
        strategy = super().__call__(context)
        device_type = context.accelerator.facts.device_type
        strategy._deepspeed = import_deepspeed(device_type)  # noqa: SLF001 - our own copy
        strategy._refuse_precision()  # noqa: SLF001
        check_nvme(strategy._merged, strategy._deepspeed)  # noqa: SLF001
        if context.sync_batchnorm:
            raise UnsupportedError(
                "Batch statistics over all processes were asked for, which the engine does not "
                "take.",
                "Set sync_batchnorm=False, or use group or layer normalization.",
            )
        strategy._connection = Connection(  # noqa: SLF001
            strategy._deepspeed,  # noqa: SLF001
            context.world,
            context.accelerator.facts.collective_backend,
        )
        return strategy

    @property
    def stage(self) -> int:
        """What is divided over ranks: 0 to 3."""
        stage: int = self._merged.get("zero_optimization.stage")
        return stage

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine. Raises ``ConfigurationError`` before there is a train step."""
        if self._engine is None:
            raise ConfigurationError(
                f"{type(self).__name__}.engine was read before there was a train step.",
                "Build one with train_step(spec).",
            )
        return self._engine

    def configuration(self, spec: StepSpec) -> Merged:
        """What DeepSpeed is configured with for this step, and which values were filled in.

        Raises:
            ConfigurationError: The configuration contradicts the step; all that does is listed.
        """
        precision = self.context.precision
        made = complete(
            self._merged,
            Wanted(
                accumulate=spec.accumulate,
                clip=None if spec.clip is None else float(spec.clip.value),
                world_size=self.context.world.size,
                precision=precision.name,
                parameters=precision.policy.parameters,
            ),
        )
        optimizer = spec.optimizers[0]
        kind = type(optimizer).__name__
        if self.stage and not _is_tested(optimizer):
            made.agree("zero_allow_untested_optimizer", value=True, source=kind)
        offloads = made.get("zero_optimization.offload_optimizer.device") in {"cpu", "nvme"}
        if offloads and not _is_for_host(optimizer):
            made.agree("zero_force_ds_cpu_optimizer", value=False, source=kind)
        made.finish()
        return made

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move, and take over the parameters and buffers of rank 0, in place.

        A module that an earlier run left divided is made whole first. At stage 3, one that was
        built on the meta device gets its values layer by layer, and each is divided at once; one
        that was built under ``zero_init`` stays divided.

        Raises:
            ConfigurationError: A layer on the meta device has no ``reset_parameters``, or the
                module was divided in another format.
        """
        self._release()
        if has_no_values(module):
            return self._give_values(module)
        if self.stage == _DIVIDED and built_divided(module):
            check_built(module, getattr(torch, self.context.precision.policy.parameters))
            module = moved(self.context.precision.convert(module), self.device)
            self._module = module
        else:
            self._make_whole(module)
            module = super().prepare(module)
        for parameter in module.parameters():
            if not parameter.is_contiguous():  # the engine sends and flattens memory as it lies
                parameter.data = parameter.data.contiguous()
        if self.context.world.size > 1:
            with torch.no_grad():
                for tensor in [*module.parameters(), *module.buffers()]:
                    if not is_divided(tensor):
                        tensor.copy_(self.context.collectives.broadcast(tensor.detach()))
        if self._merged.get("zero_optimization.offload_param.device") == "nvme":
            # The engine's own dividing would write float32 into files as bfloat16 where the device
            # has no float16.
            dividing(self._deepspeed, self.context, self._merged.values, module)
        return module

    def zero_init(self) -> AbstractContextManager[Any]:
        """``deepspeed.zero.Init`` as this strategy needs it; below stage 3 it does nothing.

        A model that is built in it is divided layer by layer, so that no rank ever holds it whole.
        """
        if self.stage < _DIVIDED:
            return nullcontext()
        return dividing(self._deepspeed, self.context, self._merged.values)

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Make an engine, and the train step from it. An earlier step cannot be called any more.

        Raises:
            UnsupportedError: The engine cannot do what the spec asks for.
            ConfigurationError: DeepSpeed's configuration contradicts the spec, or is refused.
        """
        self._release()
        self._refuse(spec)
        optimizer = spec.optimizers[0]
        self._names = names_by_group(optimizer, spec.module)
        made = self.configuration(spec)
        self._tell(made)
        if "activation_checkpointing" in made.values:
            # Without this, deepspeed.checkpointing.checkpoint does not see the section.
            self._deepspeed.checkpointing.configure(None, deepspeed_config=made.values)
        module = LossModule(spec.module, spec.loss, self.context.precision)
        self._optimizers = (optimizer,)
        self._engine = make_engine(self._deepspeed, self.context, module, optimizer, made.values)
        self._shards = self._make_shards()
        if self.stage == _DIVIDED:
            _name_the_whole(spec.module)
        self._step = EngineStep(
            self._engine,
            spec,
            discard=lambda: discard(self._engine),
            collectives=self.context.collectives,
            world_size=self.context.world.size,
            device=self.device,
        )
        return self._step

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. At stage 3, entering it gathers the model: all ranks do."""
        step = super().eval_step(spec)
        if self.stage < _DIVIDED or not self.options.gather_for_evaluation:
            return step
        return GatheredEvalStep(step, spec.module, self._deepspeed)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Refused: the engine calls backward and the optimizer itself."""
        raise UnsupportedError(
            "A manual step was asked for, and DeepSpeed's engine owns backward and the update.",
            "Use automatic optimization, or 'ddp'.",
        )

    def state(self) -> ModelState:
        """The whole state, on every rank, as copies on the host; every rank calls it."""
        module = self._prepared()
        half = self.context.precision.policy.parameters in _HALF
        values = module_state(
            module,
            self._shards,
            half=half,
            trained_only=self.options.exclude_frozen_parameters,
        )
        optimizers = []
        if self._engine is not None:
            optimizers = [self._optimizer_state(module)]
        return ModelState(values, optimizers, self.context.precision.state_dict())

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any strategy and any number of ranks.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        module = self._prepared()
        restore_module_state(
            module,
            self._shards,
            state.module,
            strict=strict,
            trained_only=self.options.exclude_frozen_parameters,
        )
        if self._engine is None or not state.optimizers:
            return
        if self._shards is None:
            restore_optimizers(self._optimizers, module, state.optimizers, strict=strict)
        else:
            _one_optimizer(state.optimizers)
            assert self._names is not None
            restore_optimizer_state(
                self._shards, module, self._names, state.optimizers[0], strict=strict
            )
        self._load_engine(state.optimizers[0].get("engine", {}))

    def save_native(
        self, folder: str | os.PathLike[str], tag: str, client_state: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint in DeepSpeed's own format; every rank calls it.

        Args:
            folder: A folder that all ranks see.
            tag: The name of the checkpoint in it.
            client_state: What to keep with it.
        """
        self.engine.save_checkpoint(
            str(folder),
            tag,
            client_state=client_state or {},
            exclude_frozen_parameters=self.options.exclude_frozen_parameters,
        )

    def load_native(
        self, folder: str | os.PathLike[str], tag: str | None = None, *, trusted: bool = False
    ) -> dict[str, Any]:
        """Restore a checkpoint in DeepSpeed's own format; every rank calls it.

        Args:
            folder: What was given to ``save_native``, or to ``engine.save_checkpoint`` elsewhere.
            tag: The name of the checkpoint in it; None takes what the file ``latest`` says.
            trusted: That the files come from somebody who may run code here: they are pickles.

        Returns:
            What was kept with it.

        Raises:
            NotFoundError: There is no such checkpoint.
            CheckpointError: It was not declared to be trusted; it is of another stage or number of
                ranks; or DeepSpeed cannot read it.
        """
        engine = self.engine
        found = find(folder, tag)
        check_trusted(found.path, trusted=trusted)
        universal = bool(self._merged.get("checkpoint.load_universal"))
        check_fits(found, self.stage, self.context.world.size, universal=universal)
        path, client_state = engine.load_checkpoint(
            str(found.folder),
            found.tag,
            load_module_strict=not self.options.exclude_frozen_parameters,
        )
        if path is None:
            raise CheckpointError(
                f"DeepSpeed did not load {str(found.path)!r}.",
                "Look at what it logged, or load its weights with read_native.",
            )
        if universal:
            assert self._shards is not None, "nothing of stage 0 is universal"
            mend_universal(self._shards.inner, found)
        return dict(client_state or {})

    def close(self) -> None:
        """Destroy the engine and release the device. A divided module stays divided."""
        self._release()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        if not options:
            return
        try:
            self.options = replace(self.options, **options)
        except TypeError as error:
            raise _unknown_options(options) from error
        self._merged = read(self.options)

    def _refuse_precision(self) -> None:
        precision = self.context.precision
        parameters = precision.policy.parameters
        accelerator = self._deepspeed.accelerator.get_accelerator()
        if parameters == "float16" and not accelerator.is_fp16_supported():
            raise UnsupportedError(
                f"precision={precision.name!r} was asked for, and DeepSpeed has no float16 on "
                f"{accelerator.device_name()!r} devices like these.",
                "Use 'bf16-true', 'bf16-mixed' or '32-true'.",
            )
        if parameters not in {"float32", *_HALF} or precision.policy.compute == "float64":
            raise UnsupportedError(
                f"precision={precision.name!r} was asked for, and the engine stores parameters in "
                "float32, bfloat16 or float16.",
                "Use '32-true', 'bf16-mixed' or 'bf16-true'.",
            )
        if parameters in _HALF and self.stage == 0:
            raise UnsupportedError(
                f"precision={precision.name!r} was asked for at stage 0, at which updates are made "
                "in the half precision that parameters are stored in.",
                "Use stage 1, or precision='bf16-mixed'.",
            )
        if parameters == "float32" and precision.policy.loss_scaling:
            raise UnsupportedError(
                f"precision={precision.name!r} scales the loss, which the engine does itself and "
                "only for parameters in float16.",
                "Use 'bf16-mixed', or DeepSpeedPrecision(16).",
            )

    def _refuse(self, spec: StepSpec) -> None:
        check_spec(spec, self.context.precision)
        if len(spec.optimizers) > 1:
            raise UnsupportedError(
                f"{len(spec.optimizers)} optimizers were given, and an engine updates with one.",
                "Put the parameters into groups of one optimizer, or use 'ddp'.",
            )
        optimizer = spec.optimizers[0]
        if needs_closure(optimizer):
            raise UnsupportedError(
                f"{type(optimizer).__name__} evaluates the loss itself, which the engine does not "
                "offer it.",
                "Use another optimizer, or 'ddp'.",
            )
        if self.stage and isinstance(optimizer, torch.optim.Adagrad):
            raise UnsupportedError(
                "torch.optim.Adagrad was given, which the engine builds anew at stage "
                f"{self.stage}, so that schedulers of the one that was given would do nothing.",
                "Use another optimizer, or stage 0.",
            )
        if spec.clip is not None and spec.clip.by != "norm":
            raise UnsupportedError(
                f"Clipping by {spec.clip.by} was asked for, and the engine clips by norm.",
                "Clip by norm, or use 'ddp'.",
            )
        for hook in ("before_optimizer_step", "before_zero_grad"):
            if getattr(spec.hooks, hook) is not None:
                raise UnsupportedError(
                    f"The hook {hook} was given, which the engine has no moment for.",
                    "Leave it out, or use 'ddp'.",
                )

    def _make_shards(self) -> Groups | Partitions | None:
        if self.stage == 0:
            return None
        if self.stage == _DIVIDED:
            return Partitions(self._engine.optimizer)
        return Groups(self._engine.optimizer, self.context.collectives)

    def _optimizer_state(self, module: nn.Module) -> dict[str, Any]:
        if self._shards is None:
            made = gather_optimizer(self._optimizers[0], module)
        else:
            assert self._names is not None
            made = optimizer_state(self._shards, module, self._names)
        if own := self._engine_state():
            made["engine"] = own
        return made

    def _engine_state(self) -> dict[str, Any]:
        """What the engine keeps besides: its scheduler, and the scale of the loss."""
        own: dict[str, Any] = {}
        if self._engine.lr_scheduler is not None:
            own["scheduler"] = self._engine.lr_scheduler.state_dict()
        if self.context.precision.policy.loss_scaling:
            own["scale"] = float(self._engine.optimizer.cur_scale)
        return own

    def _load_engine(self, own: Mapping[str, Any]) -> None:
        if "scheduler" in own and self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(dict(own["scheduler"]))
        if "scale" in own and self.context.precision.policy.loss_scaling:
            self._engine.optimizer.loss_scaler.cur_scale = own["scale"]

    def _give_values(self, module: nn.Module) -> nn.Module:
        module = self.context.precision.convert(module)
        if self.stage == _DIVIDED:
            values = self._merged.values
            divide_layer_by_layer(self._deepspeed, self.context, values, module, self.device)
        else:
            fill(module, self.context, self.device)
        self._module = module
        return module

    def _make_whole(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if is_divided(parameter):
                value = whole_parameter(parameter)
                _forget(parameter)
                parameter.data = value

    def _tell(self, made: Merged) -> None:
        """One notice of what was filled in, from the first rank."""
        if self.context.world.rank:
            return
        filled = ", ".join(f"{key}={value!r}" for key, value in sorted(made.filled.items()))
        _LOG.info("DeepSpeed's configuration was completed with %s.", filled)
        if made.filled.get("zero_force_ds_cpu_optimizer") is False:
            warnings.warn(
                "A torch optimizer updates what is offloaded, which is slower than DeepSpeed's "
                "own; drivetrain_deepspeed.cpu_adam makes that one where it can be built.",
                stacklevel=3,
            )

    def _release(self) -> None:
        if self._step is not None:
            self._step.release()
        if self._engine is not None:
            destroy(self._engine)
        self._step = self._engine = self._shards = None


def _is_tested(optimizer: torch.optim.Optimizer) -> bool:
    from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

    return bool(is_zero_supported_optimizer(optimizer))


def _is_for_host(optimizer: torch.optim.Optimizer) -> bool:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.lion import DeepSpeedCPULion

    return isinstance(optimizer, DeepSpeedCPUAdam | DeepSpeedCPULion)


def _unknown_options(options: Mapping[str, Any]) -> ConfigurationError:
    known = sorted(Options.__dataclass_fields__)
    return ConfigurationError(
        f"The strategy 'deepspeed' was given the options {sorted(options)}; it takes {known}.",
        "Leave out the others, or put DeepSpeed's own into config.",
    )


def _one_optimizer(saved: Any) -> None:
    if len(saved) != 1:
        raise CheckpointError(
            f"The checkpoint holds {len(saved)} optimizers, and this run has 1.",
            "Configure the same optimizers, or load the weights alone.",
        )


def _name_the_whole(module: nn.Module) -> None:
    """Give each divided parameter torch's name for the way to its whole."""
    for parameter in module.parameters():
        if is_divided(parameter):
            parameter.full_tensor = _FullTensor(parameter)  # type: ignore[attr-defined]  # as a DTensor has


class _FullTensor:
    """``parameter.full_tensor()``: the whole on every rank; every rank calls it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)  # a tensor that refers to itself is never freed

    def __call__(self) -> torch.Tensor:
        return whole_parameter(self._parameter())


def _forget(parameter: Any) -> None:
    """Drop what the engine put on a parameter, so that it is an ordinary one again."""
    for name in [n for n in vars(parameter) if n.startswith("ds_")]:
        delattr(parameter, name)
    for name in ("full_tensor", "_z3_optimizer", "all_gather", "partition", "nvme_swapper"):
        if name in vars(parameter):
            delattr(parameter, name)
