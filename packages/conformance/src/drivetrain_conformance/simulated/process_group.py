"""Communication between simulated devices: gloo over the memory that they share with the host.

As strict as a vendor's library: it takes its own device's tensors and no others, has no average,
and can be told to hang or to lose a rank. Nothing here counts as use of the host by the program.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from drivetrain_conformance.simulated import device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def register(name: str, device_type: str) -> None:
    """Make ``name`` a backend of ``torch.distributed`` for tensors of ``device_type``."""
    import torch.distributed as dist

    def create(options: Any, _: Any) -> Any:
        return _group_class()(name, device_type, options)

    dist.Backend.register_backend(name, create, extended_api=True, devices=[device_type])


@functools.cache
def _work_class() -> Any:
    """The class of finished operations. Made when torch is there, as it derives from torch's."""
    import torch
    from torch.distributed.distributed_c10d import Work

    base: Any = Work

    class Finished(base):  # type: ignore[misc]
        def __init__(self, result: Any) -> None:
            super().__init__()
            self._value = result
            self._future: Any = torch.futures.Future()
            self._future.set_result(result)

        def wait(self, timeout: Any = None) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

        def is_success(self) -> bool:
            return True

        def get_future(self) -> Any:
            return self._future

        def result(self) -> Any:
            return self._value

    return Finished


@functools.cache
def _group_class() -> Any:
    """The process group. Made when torch is there, as it derives from torch's."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

    finished = _work_class()
    base: Any = dist.ProcessGroup  # its methods are overloaded for callers in Python

    class SimulatedProcessGroup(base):  # type: ignore[misc]
        def __init__(self, name: str, device_type: str, options: Any) -> None:
            rank, size = options.group_rank, options.group_size
            super().__init__(rank, size)
            self._name, self._device_type, self._timeout = name, device_type, options.timeout
            self._labels = {"name": "", "desc": ""}
            store = PrefixStore(name, options.store)
            self._gloo: Any = ProcessGroupGloo(store, rank, size, timeout=options.timeout)

        # What torch calls a group by ------------------------------------------------------------

        def getBackendName(self) -> str:  # noqa: N802 - torch's name
            return self._name

        def _set_group_name(self, name: str) -> None:
            self._labels["name"] = name

        def _set_group_desc(self, desc: str) -> None:
            self._labels["desc"] = desc

        @property
        def group_name(self) -> str:
            return self._labels["name"]

        @property
        def group_desc(self) -> str:
            return self._labels["desc"]

        # Collectives ----------------------------------------------------------------------------

        def allreduce(self, tensors: Any, opts: Any = None) -> Any:
            self._enter("allreduce", tensors)
            self._reduce_hosts(_views(tensors), _op(opts))
            return finished(tensors)

        def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
            return self.allreduce(tensors, opts)

        def reduce(self, tensors: Any, opts: Any = None) -> Any:
            self._enter("reduce", tensors)
            self._refuse(_op(opts))
            self._gloo.reduce(_views(tensors), opts).wait()
            return finished(tensors)

        def broadcast(self, tensors: Any, opts: Any = None) -> Any:
            self._enter("broadcast", tensors)
            self._gloo.broadcast(_views(tensors), opts).wait()
            return finished(tensors)

        def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            self._enter("allgather", [*inputs, *(each for part in outputs for each in part)])
            self._gloo.allgather([_views(part) for part in outputs], _views(inputs)).wait()
            return finished(outputs)

        def _allgather_base(self, output: Any, sent: Any, opts: Any = None) -> Any:
            self._enter("allgather", [output, sent])
            parts = list(_views([output])[0].view(self.size(), -1))
            self._gloo.allgather([parts], [_views([sent])[0].reshape(-1)]).wait()
            return finished([output])

        def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            self._enter("reduce_scatter", [*outputs, *(each for part in inputs for each in part)])
            for output, parts in zip(outputs, inputs, strict=True):
                sums = [view.clone() for view in _views(parts)]
                self._reduce_hosts(sums, _op(opts))
                _views([output])[0].copy_(sums[self.rank()])
            return finished(outputs)

        def _reduce_scatter_base(self, output: Any, sent: Any, opts: Any = None) -> Any:
            self._enter("reduce_scatter", [output, sent])
            total = _views([sent])[0].clone()
            self._reduce_hosts([total], _op(opts))
            mine = total.view(self.size(), -1)[self.rank()]
            _views([output])[0].copy_(mine.view(output.shape))
            return finished([output])

        def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            self._enter("gather", [*inputs, *(each for part in outputs for each in part)])
            self._gloo.gather([_views(part) for part in outputs], _views(inputs), opts).wait()
            return finished(outputs)

        def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            self._enter("scatter", [*outputs, *(each for part in inputs for each in part)])
            self._gloo.scatter(_views(outputs), [_views(part) for part in inputs], opts).wait()
            return finished(outputs)

        def alltoall_base(
            self, output: Any, sent: Any, to_sizes: Any, from_sizes: Any, opts: Any = None
        ) -> Any:
            self._enter("alltoall", [output, sent])
            views = _views([output, sent])
            self._gloo.alltoall_base(*views, to_sizes, from_sizes).wait()
            return finished([output])

        def send(self, tensors: Any, rank: int, tag: int = 0) -> Any:
            self._enter("send", tensors)
            return self._gloo.send(_views(tensors), rank, tag)

        def recv(self, tensors: Any, rank: int, tag: int = 0) -> Any:
            self._enter("recv", tensors)
            return self._gloo.recv(_views(tensors), rank, tag)

        def barrier(self, opts: Any = None) -> Any:
            self._enter("barrier", [])
            self._gloo.barrier().wait()
            return finished([])

        # What torch's functional collectives call, also for a single tensor.
        def allgather_into_tensor_coalesced(
            self, outputs: Any, inputs: Any, opts: Any = None
        ) -> Any:
            for output, sent in zip(outputs, inputs, strict=True):
                self._allgather_base(output, sent, opts)
            return finished(outputs)

        def reduce_scatter_tensor_coalesced(
            self, outputs: Any, inputs: Any, opts: Any = None
        ) -> Any:
            for output, sent in zip(outputs, inputs, strict=True):
                self._reduce_scatter_base(output, sent, opts)
            return finished(outputs)

        # The names that torch has for these from 2.13 on.
        all_gather_single_coalesced = allgather_into_tensor_coalesced
        reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
        all_gather_single = _allgather_base
        reduce_scatter_single = _reduce_scatter_base
        all_to_all_single = alltoall_base

        def shutdown(self) -> None:
            self._gloo = None

        # ----------------------------------------------------------------------------------------

        def _enter(self, operation: str, tensors: Sequence[torch.Tensor]) -> None:
            others = {each.device.type for each in tensors} - {self._device_type}
            if others:
                raise RuntimeError(
                    f"{self._name} moves tensors of {self._device_type!r} devices, and {operation} "
                    f"was called with one of {sorted(others)}."
                )
            fault = device.next_collective(self.rank())
            if fault == "hang":
                # As long as a real one would, and still interrupted by signals.
                threading.Event().wait(self._timeout.total_seconds())
                raise dist.DistBackendError(
                    f"Simulated: {operation} of rank {self.rank()} timed out after "
                    f"{self._timeout.total_seconds():g} s."
                )
            if fault == "drop":
                self._gloo = None
            if self._gloo is None:
                raise dist.DistBackendError(
                    f"Simulated: rank {self.rank()} lost its connection in {operation}."
                )

        def _refuse(self, op: Any) -> None:
            if op == dist.ReduceOp.AVG:
                raise RuntimeError(f"{self._name} does not support ReduceOp.AVG.")

        def _reduce_hosts(self, hosts: list[torch.Tensor], op: Any) -> None:
            self._refuse(op)
            options = dist.AllreduceOptions()
            options.reduceOp = op
            for host in hosts:
                self._gloo.allreduce([host], options).wait()

    def _op(options: Any) -> Any:
        return dist.ReduceOp.SUM if options is None else options.reduceOp

    def _views(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same memory as tensors of the host. Gloo writes into it, so it must be dense."""
        hosts = [torch.ops.drivetrain_sim.host_view(each) for each in tensors]
        if not all(host.is_contiguous() for host in hosts):
            raise RuntimeError("Simulated: tensors of a collective must be contiguous.")
        return hosts

    return SimulatedProcessGroup
