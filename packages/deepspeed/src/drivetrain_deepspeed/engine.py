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

import torch.distributed as dist
from drivetrain_interfaces import (
    BrokenPackageError,
    ClusterError,
    ConfigurationError,
    UnavailableError,
)
from drivetrain_toolkit.checks import same_version, usable_loss
from torch import Tensor, nn

from drivetrain_deepspeed.optimizers import drop_stale_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from drivetrain_interfaces import Precision, StrategyContext, World
    from torch.optim import Optimizer

    from drivetrain_deepspeed.config import Merged

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
#: Newer versions of torch have other names for these two, and warn about the older ones.
_RENAMED = {
    "all_gather_function": "all_gather_single",
    "reduce_scatter_function": "reduce_scatter_single",
}
#: What stage 3 leaves on each layer besides what begins with ``ds_``. The functions
#: among them belong to one engine, and an engine that finds some makes none.
_LEFT_ON_LAYERS = frozenset(
    {
        "_external_params",
        "_original_parameters",
        "applied_pre_backward_ref_cnt",
        "post_bwd_fn",
        "pre_bwd_fn",
    }
)


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


def check_nvme(merged: Merged, deepspeed: ModuleType) -> None:
    """Refuse files as a place to wait where DeepSpeed could not write them.

    Raises:
        UnavailableError: What reads and writes them cannot be compiled here.
        ConfigurationError: The folder is missing, or cannot be written.
    """
    for what in ("optimizer", "param"):
        section = f"zero_optimization.offload_{what}"
        if merged.get(f"{section}.device") != "nvme":
            continue
        folder = merged.get(f"{section}.nvme_path")
        if not folder or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ConfigurationError(
                f"{section} goes to 'nvme', and nvme_path={folder!r} is no folder that this "
                "process can write.",
                "Make it, or give another one.",
            )
        builder = deepspeed.accelerator.get_accelerator().get_op_builder("AsyncIOBuilder")
        if builder is None or not builder().is_compatible(verbose=False):
            raise UnavailableError(
                f"{section} goes to 'nvme', for which DeepSpeed compiles an operation that needs "
                "libaio and its headers; they or a C++ compiler are missing.",
                "Install libaio-dev (Debian) or libaio-devel and g++, or offload to 'cpu'.",
            )
        drop_stale_lock("async_io")


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
        self._added = "LOCAL_RANK" not in os.environ  # DeepSpeed reads it there alone
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
        if self._added:  # or the next run would take this for a place that somebody gave it
            os.environ.pop("LOCAL_RANK", None)
            self._added = False

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
        same_version("DeepSpeed", deepspeed.__version__, context.collectives)
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
    for each in module.modules():
        _forget_on(each)
    vars(module).clear()  # classes that the engine made for it are never freed


def _forget_on(module: nn.Module) -> None:
    """Drop what the engine put on a layer: the next engine would take what it finds for its own."""
    held = vars(module)
    for name in [n for n in held if n.startswith("ds_") or n in _LEFT_ON_LAYERS]:
        del held[name]
    # Its own way of reading a parameter gathers it, which "items" does not.
    held["_parameters"] = dict(held["_parameters"].items())


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
