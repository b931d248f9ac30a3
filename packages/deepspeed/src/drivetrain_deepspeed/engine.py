"""DeepSpeed itself: imported, connected to the processes that there are, and made into an engine.

Everything that is particular about starting it is here. On a CPU it would compile an operation when
it connects, and a process that is killed meanwhile leaves a lock for which every later run waits;
so that operation is switched off, and gloo communicates.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from drivetrain_interfaces import (
    BrokenPackageError,
    ClusterError,
    ConfigurationError,
    ReduceOp,
    UnavailableError,
)
from drivetrain_toolkit.checks import usable_loss
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from drivetrain_interfaces import Collectives, Precision, StrategyContext, World
    from torch.optim import Optimizer

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
#: Newer versions of torch have other names for these two, and warn about the older ones.
_RENAMED = {
    "all_gather_function": "all_gather_single",
    "reduce_scatter_function": "reduce_scatter_single",
}


class LossModule(nn.Module):
    """The user's module with a forward that takes a microbatch and returns its loss.

    It holds the same submodules, parameters and buffers under the same names, so that what the
    engine names and saves has the names of the user's module.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[nn.Module, Any], Tensor], precision: Precision
    ) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = module.__dict__[name]
        self.__dict__["_user"] = (module, loss, precision.forward)

    def forward(self, microbatch: Any) -> Tensor:
        """The loss of a microbatch, checked."""
        module, function, context = self.__dict__["_user"]
        with context():
            loss = function(module, microbatch)
        if type(loss) is not Tensor or loss.dim() or not loss.requires_grad:
            loss = usable_loss(loss)
        made: Tensor = loss
        return made


def import_deepspeed(device_type: str) -> ModuleType:
    """The package, set up for a family of devices.

    Raises:
        UnavailableError: It is not installed.
        BrokenPackageError: Its import fails.
        ConfigurationError: It has been set up for other devices in this process.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        with warnings.catch_warnings():  # of what it uses of torch, which a user cannot change
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            import deepspeed

            import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # every engine does
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise UnavailableError(
            "A DeepSpeed strategy was asked for, and DeepSpeed is not installed.",
            "Install drivetrain-deepspeed with its dependencies.",
        ) from error
    except Exception as error:
        raise BrokenPackageError(
            f"DeepSpeed could not be imported: {type(error).__name__}: {error}.",
            "Reinstall deepspeed for this version of torch.",
        ) from error
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != device_type:
        raise ConfigurationError(
            f"The run is on {device_type!r} devices, and DeepSpeed uses {found!r} in this process.",
            f"Set DS_ACCELERATOR={device_type} before the program starts.",
        )
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
    if "DEEPSPEED_LOG_LEVEL" not in os.environ:
        deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    made: ModuleType = deepspeed
    return made


class Connection:
    """DeepSpeed's view of the processes, for as long as a strategy is bound."""

    def __init__(self, deepspeed: ModuleType, world: World, backend: str) -> None:
        self._deepspeed = deepspeed
        self._own: Any = None
        if not dist.is_initialized():
            if world.size > 1:
                raise ClusterError(
                    f"DeepSpeed was asked to train on {world.size} processes, which "
                    "torch.distributed does not connect.",
                    "Use a backend whose collectives are those of torch.distributed.",
                )
            self._own = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it without saying so
            dist.init_process_group(backend, store=self._own, rank=0, world_size=1)
        if dist.get_world_size() != world.size or dist.get_rank() != world.rank:
            raise ClusterError(
                f"This is rank {world.rank} of {world.size}, and torch.distributed has rank "
                f"{dist.get_rank()} of {dist.get_world_size()}.",
                "Start the processes with one launcher alone.",
            )
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        self._group = dist.group.WORLD
        self._forget_others()
        deepspeed.init_distributed(dist_backend=backend, verbose=False, dist_init_required=False)
        deepspeed.comm.comm.cdb.drivetrain_group = self._group
        for old, new in _RENAMED.items():
            if hasattr(dist, new):
                setattr(deepspeed.comm.comm.cdb, old, getattr(dist, new))

    def close(self) -> None:
        """Disconnect, if nobody else connected this process."""
        if self._own is not None and dist.is_initialized() and dist.group.WORLD is self._group:
            self._deepspeed.comm.destroy_process_group()
            self._deepspeed.comm.comm.cdb = None
        self._own = None

    def _forget_others(self) -> None:
        """Let go of groups of processes that have been disconnected since."""
        comm = self._deepspeed.comm.comm
        if comm.cdb is None or getattr(comm.cdb, "drivetrain_group", None) is not self._group:
            from deepspeed.utils import groups

            groups._release_process_group_references(group=None)  # noqa: SLF001 - there is no other way
            comm.cdb = None


def make_engine(
    deepspeed: ModuleType,
    context: StrategyContext,
    module: LossModule,
    optimizer: Optimizer,
    config: Mapping[str, Any],
) -> Any:
    """The engine.

    Raises:
        ConfigurationError: DeepSpeed refuses the configuration.
        ClusterError: Ranks have different versions of DeepSpeed.
    """
    if context.world.size > 1:
        same_version(deepspeed.__version__, context.collectives)
    args = SimpleNamespace(
        device_rank=context.device_index if context.accelerator.facts.indexed else 0
    )
    try:
        engine, *_ = deepspeed.initialize(
            args=args,
            model=module,
            optimizer=optimizer,
            config=dict(config),
            dist_init_required=False,
        )
    except (AssertionError, ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise refused(error) from error
    except Exception as error:
        if type(error).__module__.startswith("deepspeed"):
            raise refused(error) from error
        raise
    if not engine.zero_optimization() and engine.gradient_clipping():
        engine.clip_fp32_gradients = partial(_clip_and_tell, engine)
    return engine


def destroy(engine: Any) -> None:
    """Take an engine apart, so that nothing of it stays: no hook, and no memory."""
    from deepspeed.runtime.zero import parameter_offload

    optimizer, module = engine.optimizer, engine.module
    engine.destroy()
    if hasattr(optimizer, "parameter_offload"):
        # A cache of the class keeps it, and it keeps the parameters.
        vars(optimizer.parameter_offload.get_param_coordinator()).clear()
        vars(optimizer).clear()
    stack = parameter_offload.FWD_MODULE_STACK  # modules whose forward ran; the last one stays
    stack[:] = [each for each in stack if each is not module]
    vars(module).clear()  # classes that the engine made for it are never freed


def _clip_and_tell(engine: Any) -> None:
    """What the engine does at stage 0, which keeps the norm to itself."""
    engine._global_grad_norm = nn.utils.clip_grad_norm_(  # noqa: SLF001 - where it looks for the norm
        engine.module.parameters(), engine.gradient_clipping()
    )


def refused(error: Exception) -> ConfigurationError:
    """DeepSpeed's refusal as an error of this project."""
    text = " ".join(str(error).split()) or type(error).__name__
    return ConfigurationError(
        f"DeepSpeed refused its configuration: {text.rstrip('.')}.",
        "Change what it names, in the strategy's options or in config.",
    )


def same_version(version: str, collectives: Collectives) -> None:
    """Stop ranks that have different versions of DeepSpeed, on all of them.

    Raises:
        ClusterError: They have.
    """
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:4]]
    mine = torch.tensor([*numbers, *[0] * (4 - len(numbers))], dtype=torch.int64)
    least = collectives.all_reduce(mine, ReduceOp.MIN)
    most = collectives.all_reduce(mine, ReduceOp.MAX)
    if not torch.equal(least, most):
        text = [".".join(str(int(n)) for n in found[:3]) for found in (least, most)]
        raise ClusterError(
            f"Ranks have different versions of DeepSpeed: {text[0]} and {text[1]}; this one has "
            f"{version}.",
            "Install the same version everywhere.",
        )
