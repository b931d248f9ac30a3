"""The batch of a whole machine is one loss; between machines gradients are averaged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from drivetrain_interfaces import ConfigurationError
from torch import Tensor

from drivetrain_toolkit.rows import Gathered, GatheringStep
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.strategies.ddp import DDPOptions, DDPStrategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import ManualSpec, ManualStep, StepSpec, TrainStep
    from torch import nn
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _DDP2Options(DDPOptions):
    node_size: int | None = None


class DDP2Strategy(DDPStrategy):
    """DDP in which the loss sees what all ranks of a machine have, as contrastive losses want it.

    The ranks of a machine gather their batches. Each runs the module on its own rows, and outputs
    are gathered, so the loss function works on the rows of the machine; its value is the same on
    all of them. Where the loss calls the module in another way than as a whole or by its direct
    children, each rank runs it on all rows, with the same result.

    Args:
        node_size: Ranks whose batches are one loss; None means those of one machine.
        options: Those of ``DDPStrategy``.
    """

    name = "ddp2"
    capabilities: ClassVar = CAPABILITIES["ddp2"]
    _can_part: ClassVar[bool] = False

    _node: ProcessGroup | None = None
    _sharing: _Sharing | None = None

    def __init__(self, *, node_size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        mine = {item.name: getattr(self._options, item.name) for item in fields(DDPOptions)}
        self._options = _DDP2Options(**mine, node_size=node_size)

    def train_step(self, spec: StepSpec) -> TrainStep:
        """As for ``DDPStrategy``; the step takes this rank's microbatches."""
        self._refuse_closures(spec)
        size = self._node_size()
        step = super().train_step(spec)
        if self._step is None or size == 1:
            return step
        if self._node is None:
            self._node = _node_group(self.context.world.size, size)
        gather = Gathered(self._node, self.name)
        assert self._loss is not None
        self._sharing = _Sharing(spec.module, gather, size)
        self._loss.register_forward_pre_hook(self._sharing.begin)
        self._loss.register_forward_hook(self._sharing.end, always_call=True)
        return GatheringStep(self._step, gather)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def _node_size(self) -> int:
        asked: int | None = self._options.node_size
        return self.context.world.local_size if asked is None else asked

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()
        size, world = self._node_size(), self.context.world.size
        if size < 1 or world % size:
            raise ConfigurationError(
                f"node_size={size} was asked of the strategy 'ddp2' in a world of {world}, which "
                "it does not divide.",
                f"Use a divisor of {world}, or None for the ranks of one machine.",
            )

    def _release(self) -> None:
        if self._sharing is not None:
            self._sharing.remove()
            self._sharing = None
        super()._release()


def _node_group(world: int, size: int) -> ProcessGroup:
    mine: ProcessGroup | None = None
    for first in range(0, world, size):  # every rank makes every group
        ranks = list(range(first, first + size))
        made = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = made
    assert mine is not None
    return mine


class _Sharing:
    """Calls of a module on gathered rows run on this rank's rows only."""

    def __init__(self, module: nn.Module, gather: Gathered, size: int) -> None:
        self._gather = gather
        self._size = size
        self._active = False
        self._depth = 0
        self._shared = False
        self._handles = [
            handle
            for part in (module, *module.children())
            for handle in (
                part.register_forward_pre_hook(self._before, with_kwargs=True),
                part.register_forward_hook(self._after, always_call=True),
            )
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def begin(self, *_: Any) -> None:
        """The loss function begins."""
        self._active, self._depth = True, 0

    def end(self, *_: Any) -> None:
        """The loss function ends, also by an exception."""
        self._active = False

    def _before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._active:
            return None
        self._depth += 1
        rows = sum(self._gather.counts)
        tensors = [*args, *kwargs.values()]
        if self._depth > 1 or not all(_has_rows(value, rows) for value in tensors):
            self._shared = self._shared and self._depth > 1
            return None
        self._shared = True
        first, last = self._gather.bounds
        return tuple(v[first:last] for v in args), {k: v[first:last] for k, v in kwargs.items()}

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not self._active:
            return None
        self._depth -= 1
        if self._depth or not self._shared:
            return None
        self._shared = False
        mine = self._gather.counts[self._gather.rank]
        return _joined(output, self._gather, self._size, mine)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def _joined(output: Any, gather: Gathered, size: int, mine: int) -> Any:
    join: Callable[[Any], Any] = lambda value: _joined(value, gather, size, mine)  # noqa: E731
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        return type(output)(join(value) for value in output)
    if isinstance(output, dict):
        return {key: join(value) for key, value in output.items()}
    if not _has_rows(output, mine):
        return output
    parts = gather.rows(output.detach())
    # Gradients flow into this rank's rows. Averaging over all ranks divides them by the ranks of
    # the machine too, whose parts belong together.
    parts[gather.rank] = _Scaled.apply(output, float(size))  # type: ignore[no-untyped-call]
    return torch.cat(parts)


class _Scaled(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
