"""Classes with the names and arguments that users of the older plugin API know.

Each is a thin class over the part that does the work, so that code written for the older names goes
on running. New code uses the parts themselves: ``DDPStrategy``, ``AutocastPrecision`` and so on.
A subclass that overrides a method which nothing calls any more is refused when it is defined.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError

from drivetrain_toolkit.precision import (
    FullPrecision,
    ScaledAutocastPrecision,
    ShardedScaledPrecision,
    TruePrecision,
    make_precision,
)
from drivetrain_toolkit.strategies import DDPStrategy, SingleDeviceStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from drivetrain_interfaces import CheckpointIO, ClusterEnvironment, StrategyContext
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from typing_extensions import Self

_OLD_STRATEGY_METHODS: Final = {
    "setup_environment": "prepare",
    "setup": "prepare",
    "connect": "prepare",
    "pre_dispatch": "prepare",
    "dispatch": "prepare",
    "post_dispatch": "close",
    "teardown": "close",
    "pre_configure_ddp": "configure_ddp",
    "model_to_device": "prepare",
    "start_training": "train_step",
    "start_evaluating": "eval_step",
    "start_predicting": "eval_step",
    "training_step": "train_step",
    "validation_step": "eval_step",
    "test_step": "eval_step",
    "predict_step": "eval_step",
    "process_dataloader": "feed",
    "save_checkpoint": "state",
}
_OLD_PRECISION_METHODS: Final = {
    "connect": "convert",
    "pre_dispatch": "convert",
    "dispatch": "convert",
    "forward_context": "forward",
    "train_step_context": "forward",
    "val_step_context": "forward",
    "test_step_context": "forward",
    "predict_step_context": "forward",
    "pre_backward": "backward",
    "post_backward": "backward",
    "pre_optimizer_step": "step",
    "post_optimizer_step": "step",
    "optimizer_step": "step",
    "clip_gradients": "step",
    "clip_grad_by_value": "step",
    "clip_grad_by_norm": "step",
}


def _refuse_old_overrides(cls: type, old: Mapping[str, str]) -> None:
    """Stop a method that nothing would call, which would otherwise be skipped without a word."""
    for name, new in old.items():
        if name in vars(cls):
            raise UnsupportedError(
                f"{cls.__name__}.{name} overrides a method of the older plugin API that nothing "
                "calls any more.",
                f"Override {new} instead.",
            )


class _Asked:
    """What an older strategy class could be given besides its own options. The trainer reads it."""

    checkpoint_io: CheckpointIO | None = None
    cluster_environment: ClusterEnvironment | None = None
    parallel_devices: Sequence[torch.device] | None = None


class _Place:
    """The older names for where a bound strategy stands."""

    if TYPE_CHECKING:

        @property
        def context(self) -> StrategyContext: ...

        @property
        def device(self) -> torch.device: ...

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self.device

    @property
    def global_rank(self) -> int:
        """Number of this process, from 0."""
        return self.context.world.rank

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine, from 0."""
        return self.context.world.local_rank

    @property
    def node_rank(self) -> int:
        """Number of this machine, from 0."""
        return self.context.world.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.context.world.size


class SingleDevicePlugin(_Asked, _Place, SingleDeviceStrategy):
    """One process on one device.

    Args:
        device: The device that is expected; None takes the accelerator's.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_old_overrides(cls, _OLD_STRATEGY_METHODS)

    def __init__(
        self, device: torch.device | str | None = None, checkpoint_io: CheckpointIO | None = None
    ) -> None:
        self._expected = device
        self.checkpoint_io = checkpoint_io

    def __call__(self, context: StrategyContext) -> Self:
        """A bound copy. Raises ``ConfigurationError`` if the run is on another device."""
        strategy = super().__call__(context)
        if self._expected is None:
            return strategy
        expected = torch.device(self._expected)
        other_index = expected.index is not None and expected.index != (strategy.device.index or 0)
        if expected.type != strategy.device.type or other_index:
            raise ConfigurationError(
                f"{type(self).__name__}(device={str(expected)!r}) was asked for, and the run is on "
                f"{str(strategy.device)!r}.",
                "Choose the device by the trainer's accelerator= and devices=.",
            )
        return strategy


class OldStrategy(_Asked, _Place):
    """What every older strategy class has, and which of its methods may be overridden."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_old_overrides(cls, _OLD_STRATEGY_METHODS)


class OldParallelStrategy(OldStrategy):
    """Several processes, one device each: what such older classes took besides options.

    Args:
        parallel_devices: The devices of this machine; None leaves the choice to the trainer.
        cluster_environment: Where a process's place is read from; None detects it.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        options: Options of the strategy.
    """

    def __init__(
        self,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.checkpoint_io = checkpoint_io


class ParallelPlugin(OldParallelStrategy, DDPStrategy):
    """``DDPStrategy`` with the arguments of ``OldParallelStrategy``."""


class DDPPlugin(ParallelPlugin):
    """``DDPStrategy`` with the older arguments. Override ``configure_ddp`` for another wrapper.

    Args:
        parallel_devices: The devices of this machine; None leaves the choice to the trainer.
        num_nodes: Refused: an argument of the trainer.
        cluster_environment: Where a process's place is read from; None detects it.
        sync_batchnorm: Refused: an argument of the trainer.
        checkpoint_io: How checkpoints are written; None leaves the choice to the trainer.
        ddp_comm_state: The first argument of the hook.
        ddp_comm_hook: What reduces a bucket of gradients instead of the average.
        ddp_comm_wrapper: Called with the hook; returns the one that is used.
        options: Options of ``DDPStrategy``, such as ``find_unused_parameters=True``.

    Raises:
        ConfigurationError: ``num_nodes`` or ``sync_batchnorm`` was given.
    """

    def __init__(
        self,
        parallel_devices: Sequence[torch.device] | None = None,
        num_nodes: int | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        sync_batchnorm: bool | None = None,  # noqa: FBT001 - the older signature
        *,
        checkpoint_io: CheckpointIO | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[[Any, Any], Any] | None = None,
        ddp_comm_wrapper: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("num_nodes", num_nodes), ("sync_batchnorm", sync_batchnorm)):
            if value is not None:
                raise ConfigurationError(
                    f"{type(self).__name__}({name}={value!r}) was asked for; the strategy does not "
                    "decide that.",
                    f"Give it to the trainer: Trainer({name}={value!r}).",
                )
        if ddp_comm_hook is not None and ddp_comm_wrapper is not None:
            ddp_comm_hook = ddp_comm_wrapper(ddp_comm_hook)
        if ddp_comm_hook is not None:
            options |= {"comm_hook": ddp_comm_hook, "comm_state": ddp_comm_state}
        super().__init__(parallel_devices, cluster_environment, checkpoint_io, **options)

    def determine_ddp_device_ids(self) -> list[int] | None:
        """The older name of ``device_ids``."""
        return self.device_ids


class PrecisionPlugin(FullPrecision):
    """Full precision, and the base of a precision of one's own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_old_overrides(cls, _OLD_PRECISION_METHODS)


class DoublePrecisionPlugin(TruePrecision, PrecisionPlugin):
    """Parameters and inputs in float64."""

    def __init__(self) -> None:
        super().__init__("64-true")


class MixedPrecisionPlugin(PrecisionPlugin):
    """Parameters in float32, products in half precision by ``torch.autocast``.

    Args:
        precision: 16 (with a loss that is scaled) or ``"bf16"``.
        device: The device type that autocast is for.
        scaler: A ``torch.amp.GradScaler`` whose settings are taken over; only with 16.

    Raises:
        ConfigurationError: Another precision, or a scaler where none is used.
    """

    _NAMES: ClassVar[Mapping[str, str]] = {
        "16": "16-mixed",
        "16-mixed": "16-mixed",
        "bf16": "bf16-mixed",
        "bf16-mixed": "bf16-mixed",
    }

    def __init__(
        self,
        precision: str | int = 16,
        device: str = "cuda",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        name = self._NAMES.get(str(precision))
        if name is None:
            raise ConfigurationError(
                f"{type(self).__name__}(precision={precision!r}) was asked for, and mixed "
                "precision is 16 or 'bf16'.",
                "Use one of these, or set precision= of the trainer.",
            )
        if scaler is not None and name != "16-mixed":
            raise ConfigurationError(
                f"{type(self).__name__}(precision={precision!r}) was given a scaler, and bfloat16 "
                "needs none.",
                "Leave the scaler out, or use precision=16.",
            )
        self._inner = make_precision(name, device) if scaler is None else _scaled(device, scaler)
        self.name = name
        self.policy = self._inner.policy

    def convert(self, module: nn.Module) -> nn.Module:
        """The module as it is, once it is clear that it can be trained so."""
        return self._inner.convert(module)

    def forward(self) -> AbstractContextManager[Any]:
        """A new autocast context."""
        return self._inner.forward()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, from a scaled loss in float16."""
        self._inner.backward(loss)

    def step(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Unscale, call ``prepare``, and update."""
        return self._inner.step(optimizers, prepare)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, in float16."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the loss scale."""
        self._inner.load_state_dict(state)


class NativeMixedPrecisionPlugin(MixedPrecisionPlugin):
    """The older name of ``MixedPrecisionPlugin``."""


class ShardedNativeMixedPrecisionPlugin(MixedPrecisionPlugin):
    """Mixed precision for ranks that hold gradients of different parameters.

    With 16, ranks decide together whether an update is applied. Arguments are those of
    ``MixedPrecisionPlugin``.
    """

    def __init__(
        self,
        precision: str | int = 16,
        device: str = "cuda",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(precision, device, scaler)
        if scaler is not None:
            self._inner = _scaled(device, scaler, ShardedScaledPrecision)
        elif self.name == "16-mixed":
            self._inner = ShardedScaledPrecision(device)


class FullyShardedNativeMixedPrecisionPlugin(ShardedNativeMixedPrecisionPlugin):
    """The same, for strategies that shard the parameters as well. Clipping by norm works."""


def _scaled(
    device: str,
    scaler: torch.amp.GradScaler,
    kind: type[ScaledAutocastPrecision] = ScaledAutocastPrecision,
) -> ScaledAutocastPrecision:
    return kind(
        device,
        init_scale=scaler.get_scale(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
    )


#: Those that need more of torch than most users do.
_ELSEWHERE: Final = frozenset(
    {"DDP2Plugin", "DDPShardedPlugin", "DataParallelPlugin", "RPCPlugin", "RPCSequentialPlugin"}
)


def __getattr__(name: str) -> object:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("drivetrain_toolkit.seed_strategies"), name)
