"""Communication between the hosts of several processes. Gradients never pass here: IPUs do that.

With the toolkit installed its collectives are used. It needs torch 2.6, though, which no PopTorch
works with; so here is what a run needs, over torch 2.0's gloo.
"""

from __future__ import annotations

import os
import pickle
from datetime import timedelta
from importlib import util
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from drivetrain_interfaces import (
    ClusterError,
    ConfigurationError,
    DataError,
    ReduceOp,
    UnsupportedError,
)
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import Collectives, World

#: Seconds to wait for all ranks to come, and for one operation.
RENDEZVOUS = ("DRIVETRAIN_RENDEZVOUS_TIMEOUT", 300.0)
TIMEOUT = ("DRIVETRAIN_COLLECTIVE_TIMEOUT", 900.0)

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MEAN: dist.ReduceOp.SUM,  # and divide
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
}


def make_collectives(world: World) -> Collectives:
    """The toolkit's collectives where it is installed, those of this module where it is not."""
    if util.find_spec("drivetrain_toolkit") is None:
        return HostCollectives(world)
    from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives

    return LocalCollectives() if world.size == 1 else TorchCollectives(world, "gloo")


#: What gloo of torch 2.0 does not know travels as a type that holds all of its values.
_CARRIERS = {torch.bfloat16: torch.float32, torch.bool: torch.uint8, torch.int16: torch.int32}


class HostCollectives:
    """Communication over gloo, in torch's default process group; the identity for one process.

    Args:
        world: This process's place.

    Raises:
        ClusterError: The ranks did not find each other.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._mine = False
        if world.size == 1 or dist.is_initialized():
            return
        waits, patience = (float(os.environ.get(n, d)) for n, d in (RENDEZVOUS, TIMEOUT))
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined,unused-ignore]  # torch's stub lacks it
                world.address,
                world.port,
                world.size,
                world.is_main,
                timeout=timedelta(seconds=waits),
            )
            dist.init_process_group(
                "gloo",
                store=store,
                rank=world.rank,
                world_size=world.size,
                timeout=timedelta(seconds=patience),
            )
        except (RuntimeError, ValueError) as error:
            raise ClusterError(
                f"Rank {world.rank} of {world.size} found no others at {world.address}:"
                f"{world.port}: {error}.",
                "Look whether all processes were started, and whether that address can be reached.",
            ) from error
        self._mine = True

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """The reduction over all ranks. Raises ``UnsupportedError`` for what has no such result."""
        floating = tensor.is_floating_point() or tensor.is_complex()
        if (op is ReduceOp.MEAN and not floating) or (
            op is ReduceOp.SUM and tensor.dtype is torch.bool
        ):
            raise UnsupportedError(
                f"A {op.value} of {tensor.dtype} was asked for, which {tensor.dtype} cannot hold.",
                "Convert the tensor first, such as by .float().",
            )
        if self._world.size == 1:
            return tensor
        made = _carried(tensor)
        self._do(lambda: dist.all_reduce(made, _OPS[op]))
        made = made / self._world.size if op is ReduceOp.MEAN else made
        return made.to(tensor.dtype)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor per rank. Raises ``DataError`` on every rank if they do not fit together."""
        if self._world.size == 1:
            return [tensor]
        mine = (tuple(tensor.shape), tensor.dtype)
        found: list[Any] = [None] * self._world.size
        self._do(lambda: dist.all_gather_object(found, mine))
        if len({(shape[1:], bool(shape), dtype) for shape, dtype in found}) > 1:
            raise DataError(
                f"Tensors of all ranks were to be gathered, and they are {found}.",
                "Give tensors that differ in their first dimension alone.",
            )
        most = max(shape[0] if shape else 1 for shape, _ in found)
        rows = tensor.detach().reshape(-1, *tensor.shape[1:]) if tensor.dim() else tensor.reshape(1)
        rows = _carried(rows)
        padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype)
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in found]
        self._do(lambda: dist.all_gather(parts, padded))
        return [
            (part[: shape[0]] if shape else part[0]).to(tensor.dtype)
            for part, (shape, _) in zip(parts, found, strict=True)
        ]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank ``source``. Raises ``ConfigurationError`` if there is none."""
        self._check(source)
        if self._world.size == 1:
            return tensor
        made = _carried(tensor)
        self._do(lambda: dist.broadcast(made, source))
        return made.to(tensor.dtype)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object of rank ``source``. Raises ``UnsupportedError`` if it does not pickle."""
        self._check(source)
        if self._world.size == 1:
            return value
        sent: list[Any] = [None]
        if self._world.rank == source:
            try:
                pickle.dumps(value)
                sent = [(value, "")]
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                sent = [(None, f"{type(value).__name__}: {error}")]
        self._do(lambda: dist.broadcast_object_list(sent, source))
        made, problem = sent[0]
        if problem:
            raise UnsupportedError(
                f"An object was to be sent to all ranks that does not pickle ({problem}).",
                "Send plain values.",
            )
        return made

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self._world.size > 1:
            self._do(dist.barrier)

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        if self._mine and dist.is_initialized():
            dist.destroy_process_group()
        self._mine = False

    def _check(self, source: int) -> None:
        if not 0 <= source < self._world.size:
            raise ConfigurationError(
                f"Rank {source} was to send, in a world of {self._world.size}.",
                f"Use a rank from 0 to {self._world.size - 1}.",
            )

    def _do(self, operation: Callable[[], Any]) -> None:
        try:
            operation()
        except (RuntimeError, ValueError) as error:
            raise ClusterError(
                f"Rank {self._world.rank} of {self._world.size} could not finish an operation of "
                f"all ranks: {error}.",
                "Look for the first error of another rank.",
            ) from error


def _carried(tensor: Tensor) -> Tensor:
    """A copy of a tensor in a type that can travel."""
    return tensor.detach().to(_CARRIERS.get(tensor.dtype, tensor.dtype)).contiguous().clone()
