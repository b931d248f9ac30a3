"""Communication over HCCL, within its limits, and over gloo on the host where those are too tight.

HCCL has no average, and reduces whatever is neither float32 nor bfloat16 through float32: integers
above 2^24 come out wrong, without a word. Such tensors travel over the host. What only moves bytes
goes over HCCL.
"""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from drivetrain_interfaces import ReduceOp
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives

from drivetrain_hpu import FACTS
from drivetrain_hpu.accelerator import DEVICE
from drivetrain_hpu.bridge import join, leave

if TYPE_CHECKING:
    from drivetrain_interfaces import World
    from torch import Tensor

#: What HCCL reduces without a loss. It takes float16 through float32, which holds all of it.
_EXACT = frozenset({torch.float32, torch.bfloat16, torch.float16})
_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MEAN: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
}


class HpuCollectives(TorchCollectives):
    """HCCL for what is on devices, with a group of the same ranks on the host beside it.

    Args:
        world: This process's place. The bridge is told of it before a device is opened.

    Raises:
        ClusterError: The ranks did not find each other.
        UnavailableError: The bridge does not import, or a machine has too few modules.
    """

    def __init__(self, world: World) -> None:
        self._variables = join(world)
        super().__init__(world, FACTS.collective_backend, device=DEVICE)
        self._host: Any = dist.new_group(backend="gloo", timeout=self._timeout)
        atexit.register(self.close)  # a process that ends with gloo's threads running may abort

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """The reduction over all ranks, exact in the tensor's own format.

        Raises:
            UnsupportedError: The mean of integers, which is none, or the sum of booleans.
        """
        if tensor.dtype in _EXACT:
            return super().all_reduce(tensor, op)
        LocalCollectives().all_reduce(tensor, op)  # refuses what has no meaning
        narrow = torch.uint8 if tensor.dtype is torch.bool else tensor.dtype
        host = tensor.detach().to("cpu", narrow, copy=True).contiguous()
        with self._explained("all_reduce"):
            dist.all_reduce(host, _OPS[op], group=self._host)
        if op is ReduceOp.MEAN:
            host.div_(self._world.size)
        return host.to(tensor.device, tensor.dtype)

    def barrier(self) -> None:
        """Return once every rank has called it. On the host: it opens no device."""
        with self._explained("barrier"):
            dist.barrier(group=self._host)

    def close(self) -> None:
        """Leave the groups, and set back the variables that told the bridge of this place."""
        if not self._closed:
            atexit.unregister(self.close)
            self._host = None
            leave(self._variables)
        super().close()
