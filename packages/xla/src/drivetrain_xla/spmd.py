"""All devices of a machine from one process: the program is written for one, XLA divides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from drivetrain_interfaces import ConfigurationError, ModelState, UnsupportedError
from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)
from torch import Tensor, nn
from torch_xla.utils.checkpoint import checkpoint

from drivetrain_xla.parts import placed_like, told, whole_on_host
from drivetrain_xla.runtime import open_runtime
from drivetrain_xla.sharding import Layout, Partition, make_layout
from drivetrain_xla.strategies import XlaOptions, XlaStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from drivetrain_interfaces import StrategyContext
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Self


@dataclass(frozen=True)
class SpmdOptions(XlaOptions):
    """Options of ``SpmdStrategy``."""

    mesh: Mapping[str, int] | None = None
    plan: Mapping[str, Sequence[Any]] | None = None
    wrap: Sequence[type[nn.Module]] = ()
    checkpoint: Sequence[type[nn.Module]] = ()


@dataclass
class _Undo:
    """What ``prepare`` changed about the user's module, besides where its tensors are."""

    hooks: list[RemovableHandle] = field(default_factory=list)
    patched: list[nn.Module] = field(default_factory=list)

    def __call__(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module in self.patched:
            module.__dict__.pop("forward", None)
        self.hooks, self.patched = [], []


class SpmdStrategy(XlaStrategy):
    """Data parallel, and tensor parallel by a plan; parameters are on every device.

    Results are those of one device with the whole batch. A batch whose size the devices do not
    divide goes to each of them whole.

    Args:
        mesh: Devices along each axis, such as ``{"data": 2, "model": 2}``; -1 stands for the rest.
            The batch is divided along ``data`` and ``fsdp``. Default: all along ``data``.
        plan: How parameters are divided, by patterns of their names: ``{"*.up.weight":
            ("model", None)}`` divides the first dimension along ``model``.
        wrap: Classes of modules whose outputs are to stay divided like the batch, and whose
            gradients are computed before those of the module before them. Usually the layers.
        checkpoint: Classes of modules whose activations are computed again in backward.
        compile_step: As in ``XlaStrategy``.
        max_graphs: As in ``XlaStrategy``.
    """

    name = "spmd"

    _options: SpmdOptions

    _sharded = False
    _layout: Layout
    _mesh: xs.Mesh | None
    _partitions: dict[str, Partition]
    _undo: _Undo

    def __init__(
        self,
        *,
        mesh: Mapping[str, int] | None = None,
        plan: Mapping[str, Sequence[Any]] | None = None,
        wrap: Sequence[type[nn.Module]] = (),
        checkpoint: Sequence[type[nn.Module]] = (),
        compile_step: bool = False,
        max_graphs: int = 4,
    ) -> None:
        self._options = SpmdOptions(
            compile_step, max_graphs, mesh, plan, tuple(wrap), tuple(checkpoint)
        )

    def __call__(self, context: StrategyContext) -> Self:
        """A bound copy. The whole process trains on all devices as one from here on.

        Raises:
            UnsupportedError: There are several processes, or fewer devices than all were chosen.
            ConfigurationError: The mesh does not fit the devices.
        """
        if context.world.size > 1:
            raise UnsupportedError(
                f"The strategy {self.name!r} was asked for in a world of {context.world.size} "
                "processes, and it drives the devices of one machine from one process.",
                "Start one process.",
            )
        count = context.accelerator.device_count()
        _refuse_a_part(context, count)
        if count > 1:
            open_runtime(spmd=True)
        strategy = super().__call__(context)
        options = strategy._options  # noqa: SLF001 - our own copy
        strategy._layout = make_layout(  # noqa: SLF001
            options.mesh, options.plan, count, sharded=self._sharded
        )
        # One device has nothing to divide, and need not be opened in another way for it.
        strategy._mesh = strategy._layout.mesh() if count > 1 else None  # noqa: SLF001
        strategy._partitions, strategy._undo = {}, _Undo()  # noqa: SLF001
        return strategy

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move and divide the parameters, in place.

        Raises:
            ConfigurationError: The plan does not fit the module, or a class to wrap is not in it.
        """
        partitions = self._layout.of_parameters(module)
        self._undo()
        module = super().prepare(module)
        self._partitions = partitions
        self._divide(module)
        self._change(module)
        torch_xla.sync()
        return module

    def feed(self, batch: Any) -> Any:
        """The batch, its first dimension divided over the devices; as it is if it is there."""
        fed = super().feed(batch)
        if fed is not batch and self._mesh is not None:
            self._divide_batch(fed)
        return fed

    def state(self) -> ModelState:
        """The whole state as copies on the host, made of the devices' parts; no device has it."""
        torch_xla.sync()
        module = self._prepared()
        return ModelState(
            module=gather_module(module, whole=whole_on_host),
            optimizers=[
                gather_optimizer(each, module, whole=whole_on_host) for each in self._optimizers
            ],
            precision=self.context.precision.state_dict(),
        )

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any number of devices; each device is sent its part.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        module = self._prepared()
        restore_module(module, state.module, strict=strict, place=placed_like)
        restore_optimizers(
            self._optimizers, module, state.optimizers, strict=strict, place=placed_like
        )
        self.context.precision.load_state_dict(state.precision)
        self._divide(module)
        torch_xla.sync()

    def close(self) -> None:
        """Undo what ``prepare`` changed, and release the device."""
        if self._bound is not None:
            self._undo()
        super().close()

    def _divide_batch(self, batch: Any) -> None:
        for tensor in _tensors(batch):
            partition = self._layout.of_batch(tensor)
            if partition is not None and not told(tensor):
                xs.mark_sharding(tensor, self._mesh, partition)

    def _divide(self, module: nn.Module) -> None:
        """Divide parameters, and what optimizers keep for them, which has their shape."""
        if self._mesh is None:
            return
        for name, parameter in module.named_parameters():
            partition = self._partitions[name]
            kept = [o.state[parameter] for o in self._optimizers if parameter in o.state]
            state = [value for each in kept for value in each.values()]
            for tensor in (parameter, *state):
                if _is_like(tensor, parameter) and any(partition) and not told(tensor):
                    xs.mark_sharding(tensor, self._mesh, partition)

    def _change(self, module: nn.Module) -> None:
        """Install hooks and checkpoints in the modules of the classes that were named."""
        options = self._options
        for kind in (*options.wrap, *options.checkpoint):
            if not any(isinstance(part, kind) for part in module.modules()):
                raise ConfigurationError(
                    f"The strategy {self.name!r} was to treat modules of the class "
                    f"{kind.__name__}, and {type(module).__name__} holds none.",
                    "Name classes that are in the module.",
                )
        for part in module.modules():
            if isinstance(part, tuple(options.checkpoint)):
                part.forward = partial(_recomputed, part.forward)
                self._undo.patched.append(part)
            if self._mesh is not None and isinstance(part, tuple(options.wrap)):
                self._undo.hooks.append(part.register_forward_hook(self._divide_output))

    def _divide_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            partition = self._layout.of_batch(tensor)
            if partition is not None:
                xs.mark_sharding(tensor, self._mesh, partition)
            if tensor.requires_grad:
                tensor.register_hook(_finish_gradient)  # type: ignore[no-untyped-call]


class SpmdShardedStrategy(SpmdStrategy):
    """As ``SpmdStrategy``, with parameters, gradients and optimizer state divided too (FSDPv2).

    Each parameter is divided along its largest dimension that the devices divide; one without such
    a dimension is on every device. Default mesh: all devices along ``fsdp``.
    """

    name = "fsdp"

    _sharded = True


def _refuse_a_part(context: StrategyContext, count: int) -> None:
    chosen = context.devices
    if chosen and len(chosen) != count:
        raise UnsupportedError(
            f"devices={list(chosen)} were chosen, and SPMD trains on all {count} devices of the "
            "runtime.",
            "Use devices=1 or all; TPU_VISIBLE_CHIPS, or CPU_NUM_DEVICES, says which there are.",
        )


def _is_like(value: Any, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.device == parameter.device
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors on XLA devices in a batch or an output."""
    if isinstance(value, Tensor):
        if value.device.type == "xla":
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name, None))


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """``forward``, whose activations are computed again in backward."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Gradients flow through a checkpoint only if one of its inputs asks for them.
    asks = torch.zeros((), device="xla", requires_grad=True)

    def run(_asks: Tensor, *given: Any) -> Any:
        return forward(*given, **kwargs)

    return checkpoint(run, asks, *args, use_reentrant=True)


def _finish_gradient(gradient: Tensor) -> None:
    """Keep XLA from putting the collectives of many layers off until the end."""
    xm.optimization_barrier_([gradient])
