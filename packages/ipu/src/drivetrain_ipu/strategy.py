"""The strategy: a module and its optimizer become programs that one process hands to its IPUs."""

from __future__ import annotations

import copy
import zlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError, ModelState, UnsupportedError
from drivetrain_interfaces.errors import listed

from drivetrain_ipu import FACTS, STRATEGY
from drivetrain_ipu.loader import combined_loader
from drivetrain_ipu.optimizers import DeviceOptimizer, check_optimizers
from drivetrain_ipu.options import IpuOptions, Programs
from drivetrain_ipu.pipelining import (
    begin_blocks,
    check_pipeline,
    execution,
    ipus_per_replica,
)
from drivetrain_ipu.sdk import load_sdk
from drivetrain_ipu.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)
from drivetrain_ipu.steps import IpuEvalStep, IpuTrainStep

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain_interfaces import EvalSpec, StepSpec, StrategyContext, World
    from torch import nn
    from typing_extensions import Self

#: Options that are about a run as a whole rather than about ``poptorch.Options``.
_OWN = ("loss_scaling", "max_grad_norm", "pipeline", "variable")


class IpuStrategy:
    """Trains by programs of PopTorch. Called with a context, it returns a bound copy.

    Args:
        pipeline: From names of modules to IPUs, in the order in which they are called: at each,
            that IPU takes over. Empty for one IPU.
        max_grad_norm: Clip gradients to this total norm on the device; None does not. Users of the
            SDK have found it unreliable for some models, so it is not what the trainer's own
            ``gradient_clip_val`` asks for.
        loss_scaling: A constant that the loss is multiplied by, and gradients divided by.
        variable: Hyperparameters that change during training; all others are compiled in.
        options: Fields of ``IpuOptions``.

    Raises:
        ConfigurationError: An option is unknown, or its value cannot be.
    """

    name = STRATEGY

    def __init__(
        self,
        *,
        pipeline: Mapping[str, int] | None = None,
        max_grad_norm: float | None = None,
        loss_scaling: float = 1.0,
        variable: Sequence[str] = ("lr",),
        **options: Any,
    ) -> None:
        self._settings: dict[str, Any] = {
            "pipeline": dict(pipeline or {}),
            "max_grad_norm": max_grad_norm,
            "loss_scaling": loss_scaling,
            "variable": tuple(variable),
        }
        self._options = _made_options(options)
        self._check_settings()
        self._context: StrategyContext | None = None
        self._programs: Programs | None = None
        self._network: nn.Module | None = None
        self._step: IpuTrainStep | None = None
        self._evaluations: list[IpuEvalStep] = []
        self._blocks = False
        self.sdk: Any = None

    def __call__(self, context: StrategyContext) -> Self:
        """A copy that is bound to this process. Imports PopTorch.

        Raises:
            ConfigurationError: An option is unknown, or IPUs are no power of two.
            UnsupportedError: The precision is not one that a program can hold.
            UnavailableError: PopTorch does not import.
        """
        bound = copy.copy(self)
        bound._settings = {**self._settings}  # noqa: SLF001 - its own copy
        bound._evaluations = []  # noqa: SLF001
        bound._bind(context)  # noqa: SLF001
        return bound

    def _bind(self, context: StrategyContext) -> None:
        given = {k: v for k, v in context.options.items() if k != "devices"}
        self._settings.update({k: given.pop(k) for k in _OWN if k in given})
        if given:
            base = {f.name: getattr(self._options, f.name) for f in fields(IpuOptions)}
            self._options = _made_options({**base, **given})
        self._check_settings()
        if context.precision.policy.loss_scaling:
            raise UnsupportedError(
                f"Precision {context.precision.name!r} looks at gradients to choose a loss scale, "
                "and an IPU's program does not let them out.",
                "Use a precision of the 'ipu' backend, with loss_scaling= of IpuStrategy.",
            )
        self._context = context
        replicas = self._options.replication_factor or len(context.devices) or 1
        ipus = replicas * ipus_per_replica(self._settings["pipeline"])
        if ipus & (ipus - 1) and not self._options.auto_round_num_ipus:
            raise ConfigurationError(
                f"{replicas} replicas of {ipus // replicas} IPUs were asked for; IPUs come in "
                "powers of two.",
                "Use another number, or auto_round_num_ipus=True, which leaves some idle.",
            )
        self.sdk = load_sdk()
        self._programs = Programs(
            options=self._options,
            replicas=replicas,
            world=context.world,
            seed=0,
            strategy=execution(self.sdk, self._settings["pipeline"]),
        )

    def _check_settings(self) -> None:
        norm, scale = self._settings["max_grad_norm"], self._settings["loss_scaling"]
        for name, value in (("max_grad_norm", norm), ("loss_scaling", scale)):
            if value is not None and not 0 < float(value) < float("inf"):
                raise ConfigurationError(
                    f"{name}={value!r} was asked for.", "Give a positive number."
                )

    # What steps ask
    @property
    def context(self) -> StrategyContext:
        """What it was bound with. Raises ``ConfigurationError`` for one that is not bound."""
        if self._context is None:
            raise ConfigurationError(
                "An IpuStrategy was used that is not bound to a process.",
                "Give it to a Trainer, or call it with a StrategyContext.",
            )
        return self._context

    @property
    def programs(self) -> Programs:
        """What its programs have in common."""
        assert self.context
        assert self._programs is not None
        return self._programs

    def compiled(self, executor: Any) -> None:
        """Let the accelerator know whose random numbers are the device's."""
        keep = getattr(self.context.accelerator, "follow", None)
        if keep is not None:
            keep(executor)

    def pause_training(self) -> None:
        """Take the device from the training program, for an evaluation."""
        if self._step is not None:
            self._step.detach()

    def resume_training(self) -> None:
        """Give it back, if training goes on."""
        if self._step is not None and self._step.entered:
            self._step.attach()

    # The contract
    @property
    def device(self) -> torch.device:
        """The host: programs read from there and write to it."""
        assert self.context
        return torch.device(FACTS.device_type)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, let all ranks have rank 0's tensors, and choose the device's seed.

        Raises:
            ConfigurationError: The pipeline names a module that is not there.
            UnsupportedError: Synchronized batch statistics were asked for.
        """
        context, programs = self.context, self.programs
        if context.sync_batchnorm:
            raise UnsupportedError(
                "Synchronized batch normalization was asked for, which PopTorch does not offer.",
                "Set sync_batchnorm=False, or use group or layer normalization.",
            )
        self._release()
        network = context.precision.convert(module)
        if context.world.size > 1:
            with torch.no_grad():
                for tensor in (*network.parameters(), *network.buffers()):
                    tensor.copy_(context.collectives.broadcast(tensor.detach()))
        seed = self._options.random_seed
        if seed is None:
            seed = zlib.crc32(bytes(torch.get_rng_state().tolist()))
        seed = context.collectives.broadcast_object(seed)
        self._programs = Programs(
            programs.options, programs.replicas, programs.world, seed, programs.strategy
        )
        self._network = network
        return network

    def feed(self, batch: Any) -> Any:
        """The batch itself, which is on the host already."""
        return batch

    def train_step(self, spec: StepSpec) -> IpuTrainStep:
        """Build the train step; it is compiled when it first sees a batch.

        Raises:
            ConfigurationError: There is no optimizer, or a number is out of range.
            UnsupportedError: Several optimizers, clipping, hooks, or an optimizer that the device
                does not have.
        """
        _refuse(spec)
        settings = self._settings
        optimizer = check_optimizers(spec.optimizers, clips=settings["max_grad_norm"] is not None)
        pipeline = settings["pipeline"]
        check_pipeline(spec.module, pipeline, spec.accumulate)
        self._release()
        if pipeline:
            begin_blocks(spec.module, pipeline, self.sdk)
            self._blocks = True
        extras = {}
        if settings["max_grad_norm"] is not None:
            extras["max_grad_norm"] = float(settings["max_grad_norm"])
        if settings["loss_scaling"] != 1.0:
            extras["loss_scaling"] = float(settings["loss_scaling"])
        self._network = spec.module
        made = DeviceOptimizer(optimizer, self.sdk, settings["variable"], extras)
        self._step = IpuTrainStep(spec, self.context.precision, self, made)
        return self._step

    def eval_step(self, spec: EvalSpec) -> IpuEvalStep:
        """Build an evaluation step. Raises ``UnsupportedError`` for inference mode."""
        if spec.inference_mode:
            raise UnsupportedError(
                "An evaluation under torch.inference_mode was asked for, whose tensors no program "
                "takes.",
                "Use inference_mode=False, which is torch.no_grad.",
            )
        step = IpuEvalStep(spec, self.context.precision, self)
        self._evaluations.append(step)
        return step

    def state(self) -> ModelState:
        """The whole state as copies: weights come to the host first, then the optimizer's state."""
        network = self._trained()
        step = self._step
        optimizers = []
        if step is not None:
            if step.executor is not None:
                step.executor.copyWeightsToHostIfNeeded()
                step.optimizer.pull(network)
            optimizers = [gather_optimizer(step.optimizer.mine, network)]
        return ModelState(
            module=gather_module(network),
            optimizers=optimizers,
            precision=self.context.precision.state_dict(),
        )

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state; ``CheckpointError`` names what does not fit.

        The optimizer's state goes to the device once there is a program.
        """
        network = self._trained()
        step = self._step
        executor = None if step is None else step.executor
        if executor is not None:
            executor.copyWeightsToHostIfNeeded()
        restore_module(network, state.module, strict=strict)
        if step is not None:
            restore_optimizers([step.optimizer.mine], network, state.optimizers, strict=strict)
            if executor is not None:
                if step.optimizer.changed():
                    executor.setOptimizer(step.optimizer.device)
                if executor.isAttachedToDevice():
                    executor.copyWeightsToDevice()
                if state.optimizers:
                    step.optimizer.push(network)
        self.context.precision.load_state_dict(state.precision)

    def close(self) -> None:
        """Destroy all programs, and give the module back as it was. Safe to call twice."""
        self._release()
        self._network = None

    # Pieces
    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        devices: int | Sequence[int] = 1,
        training: bool = True,
        world: World | None = None,
        **arguments: Any,
    ) -> Any:
        """A ``poptorch.DataLoader`` whose batches fit one call of the trainer's step.

        Args:
            dataset: A data set of torch.
            batch_size: Samples that one forward sees, of one replica.
            devices: The trainer's ``devices=``, or the plan's.
            training: Whether it is for training, or for evaluation.
            world: The place of this process, where there are several.
            arguments: Further ones of ``poptorch.DataLoader``.

        Raises:
            ConfigurationError: The data set is too small for one batch, or cannot be divided.
        """
        replicas = self._options.replication_factor or (
            devices if isinstance(devices, int) else len(devices)
        )
        return combined_loader(
            self._options, dataset, batch_size, replicas, world, training=training, **arguments
        )

    def _trained(self) -> nn.Module:
        assert self.context
        if self._network is None:
            raise ConfigurationError(
                "The state of an IpuStrategy was asked for before it prepared a module.",
                "Call prepare first.",
            )
        return self._network

    def _release(self) -> None:
        for evaluation in self._evaluations:
            evaluation.release()
        self._evaluations = []
        if self._step is not None:
            self._step.release()
            self._step = None
        if self._blocks and self._network is not None:
            self.sdk.removeBlocks(self._network)
        self._blocks = False


def _made_options(options: Mapping[str, Any]) -> IpuOptions:
    known = [item.name for item in fields(IpuOptions)]
    strange = sorted(set(options) - set(known))
    if strange:
        raise ConfigurationError(
            f"The strategy {STRATEGY!r} was given the options {strange}; it takes "
            f"{listed((*known, *_OWN))}.",
            "Leave out the others.",
        )
    return IpuOptions(**options)


def _refuse(spec: StepSpec) -> None:
    """Refuse, by name, what a program cannot do."""
    if spec.accumulate < 1:
        raise ConfigurationError(
            f"accumulate={spec.accumulate!r} was asked for.", "Give 1 or more."
        )
    if spec.clip is not None:
        raise UnsupportedError(
            f"Gradient clipping by {spec.clip.by} ({spec.clip.value!r}) was asked for, and an "
            "IPU's program does not let gradients or their norm out.",
            "Use IpuStrategy(max_grad_norm=...), which clips by norm on the device.",
        )
    for item in fields(spec.hooks):
        if getattr(spec.hooks, item.name) is not None:
            raise UnsupportedError(
                f"The hook {item.name} was asked for, and an IPU's program calls no user code.",
                "Leave it out, or use another accelerator.",
            )
