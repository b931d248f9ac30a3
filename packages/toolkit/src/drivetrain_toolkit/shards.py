"""Tensors of which each rank holds a part: their state, norm, and whether all are finite.

Parts are ``DTensor``s, as FSDP and tensor parallelism make them. What is done here is done on the
plain tensors inside, which costs one reduction for each way in which tensors are divided, and no
more host time than for tensors that are whole.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from drivetrain_interfaces import ModelState, Shard, StoredTensor
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import placement_types as placements

from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from drivetrain_interfaces import Precision
    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from drivetrain_toolkit.steps import Update


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; the tensor itself if it is whole."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # noqa: SLF001 - to_local() makes an autograd view


def whole_of(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; every rank calls it. The tensor itself if it is whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:  # parts that wait on the host
        tensor = cast("DTensor", tensor.to(tensor.device_mesh.device_type))
    return tensor.full_tensor()


def like(whole: Tensor, wanted: Tensor) -> Tensor:
    """``whole``, which every rank has, divided and placed like ``wanted``. Sends nothing."""
    if not isinstance(wanted, DTensor):
        return whole
    mesh = wanted.device_mesh
    home = wanted.device if wanted.device.type != "cpu" else torch.device(mesh.device_type)
    made = distribute_tensor(whole.to(home), mesh, wanted.placements, src_data_rank=None)
    return made.to(wanted.device)


def shard_of(tensor: Tensor) -> Tensor | Shard:
    """This rank's part, sharing memory, with its place in the whole.

    A tensor that is whole is returned as it is. One that is divided in a way in which a rank's part
    is no box is made whole, by all ranks together.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    box = _box_of(tensor)
    if box is None:
        return whole_of(tensor)
    return Shard(part_of(tensor), box[0], tuple(tensor.shape))


def stored_like(stored: Any, wanted: Tensor) -> Tensor:
    """What this rank holds of a stored tensor, placed like ``wanted``; reads no more than that."""
    if not isinstance(stored, StoredTensor):
        return like(stored, wanted)
    box = _box_of(wanted) if isinstance(wanted, DTensor) else None
    if box is None:
        return like(stored.read(), wanted)
    held = cast("DTensor", wanted)
    part = stored.read(*box).to(held.device)
    return DTensor.from_local(
        part,
        held.device_mesh,
        held.placements,
        run_check=False,
        shape=held.shape,
        stride=held.stride(),
    )


def _box_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Where this rank's part begins and how large it is; None if it is no such box."""
    start, size = [0] * tensor.dim(), list(tensor.shape)
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not placements.Shard:
            return None
        # As torch divides: chunks of the same size, the last ones smaller or empty.
        axis, ranks = placement.dim, tensor.device_mesh.size(dim)
        chunk = -(-size[axis] // ranks)
        first = min(chunk * tensor.device_mesh.get_local_rank(dim), size[axis])
        start[axis] += first
        size[axis] = min(chunk, size[axis] - first)
    if tuple(size) != tuple(part_of(tensor).shape):
        return None
    return tuple(start), tuple(size)


def sharded_parts(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    precision: Precision,
    *,
    absent: Collection[str] = (),
) -> ModelState:
    """What this rank holds of the state of a module: copies on the host, nothing is gathered.

    Args:
        module: The module.
        optimizers: Of its parameters.
        precision: The numeric format.
        absent: Names of the tensors of which this rank holds nothing.
    """
    return ModelState(
        module=gather_module(module, whole=shard_of, absent=absent),
        optimizers=[
            gather_optimizer(each, module, whole=shard_of, absent=absent) for each in optimizers
        ],
        precision=precision.state_dict(),
    )


def gather_parts(
    module: nn.Module, optimizers: Sequence[Optimizer], precision: Precision, *, keep: bool
) -> ModelState:
    """The whole state of a module of which each rank holds parts. Every rank calls it.

    ``keep`` is False on ranks that only help others; they return an empty state.
    """
    gathered = [gather_optimizer(each, module, whole=whole_of, keep=keep) for each in optimizers]
    return ModelState(
        module=gather_module(module, whole=whole_of, keep=keep),
        optimizers=gathered if keep else [],
        precision=precision.state_dict(),
    )


def restore_parts(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    precision: Precision,
    state: ModelState,
    *,
    strict: bool,
    absent: Collection[str] = (),
) -> None:
    """Restore a whole state, of which each rank keeps its parts; stored tensors are read so far.

    ``absent`` is as for ``sharded_parts``.

    Raises:
        CheckpointError: Something does not fit; names what.
    """
    restore_module(module, state.module, strict=strict, place=stored_like, absent=absent)
    some = [
        {**each, "state": {n: kept for n, kept in each["state"].items() if n not in absent}}
        for each in state.optimizers
    ]
    restore_optimizers(optimizers, module, some, strict=strict, place=stored_like)
    precision.load_state_dict(state.precision)


class Shards:
    """The gradients of a sharded module, for ``make_train_step(parts=…)``.

    Args:
        everywhere: Groups over which plain tensors are different parts too, as pipeline stages are.
        device: Where a rank sums that has no gradient. Default: the host.
    """

    def __init__(
        self, everywhere: Sequence[ProcessGroup] = (), device: torch.device | None = None
    ) -> None:
        self._home = device or torch.device("cpu")
        self._everywhere = tuple(everywhere)
        self._divided: list[tuple[ProcessGroup, ...]] = []
        self._groups: dict[Any, tuple[ProcessGroup, ...]] = {}
        self._wide: torch.dtype | None = None

    def gradients(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """This rank's parts, as plain tensors that share memory with the gradients."""
        grads = {
            id(p): p.grad
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        if self._wide is None:
            self._wide = _wide(optimizers)
        self._divided = [self._divided_over(grad) for grad in grads.values()]
        return [part_of(grad) for grad in grads.values()]

    def pending(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """What a window has left so far, before ranks average it."""
        return self.gradients(optimizers)

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The 2-norm of all parts of all ranks: in float32 at least, equal on every rank."""
        home = grads[0].device if grads else self._home
        wide = self._wide or torch.float32
        total = torch.zeros((), dtype=wide, device=home)
        # Every rank holds the same names, and so goes through the same groups in the same order.
        kinds: dict[tuple[ProcessGroup, ...], list[Tensor]] = (
            {self._everywhere: []} if self._everywhere else {}
        )
        for grad, groups in zip(grads, self._divided, strict=True):
            kinds.setdefault(groups, []).append(grad)
        for groups, members in kinds.items():
            squared = _squared_norm([grad for grad in members if grad.numel()], wide, home)
            for group in groups:
                dist.all_reduce(squared, group=group)
            total = total + squared
        return total.sqrt()

    def _divided_over(self, grad: Tensor) -> tuple[ProcessGroup, ...]:
        if not isinstance(grad, DTensor):
            return self._everywhere
        key = (id(grad.device_mesh), grad.placements)
        if key not in self._groups:
            mesh = grad.device_mesh
            self._groups[key] = self._everywhere + tuple(
                mesh.get_group(dim)
                for dim, placement in enumerate(grad.placements)
                if not placement.is_replicate()
            )
        return self._groups[key]


def _wide(optimizers: Sequence[Optimizer]) -> torch.dtype:
    """What norms are summed in. All ranks look at the same parameters, also those they lack."""
    kinds = {p.dtype for each in optimizers for group in each.param_groups for p in group["params"]}
    return torch.float64 if torch.float64 in kinds else torch.float32


def _squared_norm(grads: Sequence[Tensor], wide: torch.dtype, home: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=wide, device=home)
    norms = torch._foreach_norm(list(grads), 2.0, dtype=wide)  # noqa: SLF001 - documented, underscore or not
    squared: Tensor = torch.stack([norm.to(home) for norm in norms]).square().sum()
    return squared


def shared_update(precision: Precision, group: ProcessGroup | None) -> Update:
    """``precision.step`` for ranks that hold different parts, so that all apply or none does.

    A precision that scales the loss looks for gradients that are not finite, and finds those of its
    rank. With this, what one rank finds, all find: each gets one more gradient, that is not finite
    if any gradient of any rank is not. It never waits for the device.

    Args:
        precision: The numeric format.
        group: The ranks; None means all.
    """
    if not precision.policy.loss_scaling:
        return precision.step
    return partial(_update_together, precision, group)


def _update_together(
    precision: Precision,
    group: ProcessGroup | None,
    optimizers: Sequence[Optimizer],
    prepare: Callable[[], None],
) -> bool:
    views = [_Parts(optimizer) for optimizer in optimizers]
    home = part_of(optimizers[0].param_groups[0]["params"][0]).device
    flag = _not_finite([view for each in views for view in each.views], home)
    dist.all_reduce(flag, group=group)
    witness = torch.zeros_like(flag)
    witness.grad = flag
    views[0].param_groups[0]["params"].append(witness)
    return precision.step(cast("list[Optimizer]", views), prepare)


def _not_finite(views: Sequence[Tensor], home: torch.device) -> Tensor:
    """Zero if all gradients are finite, else NaN."""
    full = [view.grad for view in views if view.grad is not None and view.numel()]
    if not full:
        return torch.zeros((), device=home)
    norms = torch._foreach_norm(full, float("inf"))  # noqa: SLF001 - documented, underscore or not
    return torch.stack([norm.to(home, torch.float32) for norm in norms]).sum() * 0.0


class _Parts:
    """An optimizer as a precision sees it: plain tensors whose gradients are this rank's parts."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.views: list[Tensor] = []
        self.param_groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            views = [_view(p) for p in group["params"] if p.grad is not None]
            self.views += views
            self.param_groups.append({**group, "params": views})

    def step(self) -> None:
        self._optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _view(parameter: Tensor) -> Tensor:
    view = part_of(parameter).detach()
    assert parameter.grad is not None
    view.grad = part_of(parameter.grad)
    return view
