"""Averages over ranks, such as of gradients for steps whose backward the user's code calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import ReduceOp
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from drivetrain_interfaces import Collectives

#: Small gradients travel together, large ones do not need twice their memory at once.
BUCKET_BYTES = 25 * 2**20


def average_gradients(parameters: Sequence[Tensor], collectives: Collectives) -> None:
    """Replace each gradient by its mean over all ranks; every rank calls it with the same list.

    A parameter that has a gradient on some rank counts as zero on the others. One that has none
    anywhere keeps none, so that the optimizer passes over it. Finding out takes one small
    reduction and one host read.
    """
    if not parameters:
        return
    home = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    wanted = collectives.all_reduce(present.to(home), ReduceOp.MAX).tolist()
    grads = [_gradient(p) for p, want in zip(parameters, wanted, strict=True) if want]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        flat = collectives.all_reduce(flat, ReduceOp.MEAN)
        parts = torch.split(flat, [grad.numel() for grad in bucket])
        for grad, part in zip(bucket, parts, strict=True):
            grad.copy_(part.view_as(grad))


def mean_over(collectives: Collectives, tensor: Tensor) -> Tensor:
    """The mean of what ranks hold; the tensor itself if it holds no fractions."""
    return collectives.all_reduce(tensor, ReduceOp.MEAN) if tensor.is_floating_point() else tensor


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:  # ranks hold different elements; only dense ones line up
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of one dtype and device, in order, of at most ``BUCKET_BYTES`` each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for grad in kind:
            if bucket and size + grad.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        yield bucket
