"""Communication between ranks. The rules are in docs/contracts/collectives.md."""

from __future__ import annotations

import atexit
import math
import os
import pickle
import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
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
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from drivetrain_toolkit.cutting import abort_group, open_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from drivetrain_interfaces import World

#: The variable by which torchrun says that it hosts the store itself.
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"

#: Variables for times in seconds, and what they are without them.
TIMEOUT = ("DRIVETRAIN_COLLECTIVE_TIMEOUT", 900.0)
RENDEZVOUS = ("DRIVETRAIN_RENDEZVOUS_TIMEOUT", 300.0)
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MEAN: dist.ReduceOp.SUM,  # and divide: not every backend has an average
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
}

#: One store per address for as long as the process lives, and how often it was used. Closing and
#: hosting it again would race with ranks that still talk to the old one.
_STORES: dict[tuple[str, int, int], tuple[Store, int]] = {}


class LocalCollectives:
    """Communication in a world of one: the identity, with the same refusals."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """The tensor itself."""
        _refuse_dtype(tensor, op)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """A list of the tensor itself."""
        return [tensor]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor itself."""
        _refuse_source(source, 1)
        return tensor

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object itself."""
        _refuse_source(source, 1)
        return value

    def barrier(self) -> None:
        """Nothing to wait for."""


class TorchCollectives:
    """Communication over ``torch.distributed``, in its default process group.

    Rank 0 hosts the store through which ranks find each other, unless torchrun does.

    Args:
        world: This process's place.
        backend: Name of the ``torch.distributed`` backend.
        timeout_s: Seconds that one operation may take before it fails; by default
            ``DRIVETRAIN_COLLECTIVE_TIMEOUT``, or 900.
        rendezvous_s: Seconds to wait for all ranks to come; by default
            ``DRIVETRAIN_RENDEZVOUS_TIMEOUT``, or 300.
        device: Where the backend wants tensors; others travel there and back. None leaves them.
        env: The variables of this process.

    Raises:
        ClusterError: The ranks did not find each other.
    """

    def __init__(
        self,
        world: World,
        backend: str,
        *,
        timeout_s: float | None = None,
        rendezvous_s: float | None = None,
        device: torch.device | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._world = world
        self._backend = backend
        self._device = device
        self._sockets: frozenset[tuple[int, int]] = frozenset()
        self._aborted = False
        variables = os.environ if env is None else env
        self._timeout = _seconds(timeout_s, variables, *TIMEOUT)
        self._rendezvous = _seconds(rendezvous_s, variables, *RENDEZVOUS)
        agent = variables.get(AGENT_STORE) == "True"
        # Only a store that torchrun hosts outlives a restart. Agents count restarts each for
        # itself, so with a store of this very start the number would keep ranks apart.
        self._generation = world.restarts if agent else 0
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            self._connect(hosts=world.is_main and not agent)
        elif (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise ClusterError(
                f"torch.distributed is initialized already, as rank {dist.get_rank()} of "
                f"{dist.get_world_size()}; this process should be rank {world.rank} of "
                f"{world.size}.",
                "Leave the initialization to the trainer, or make the two agree.",
            )
        self._closed = False
        if self._owns_group and "gloo" in backend:
            # A process that ends with gloo's threads running may abort, which hides its exit code.
            atexit.register(self.close)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """The reduction over all ranks.

        Raises:
            UnsupportedError: The mean of integers, which is none, or the sum of booleans.
        """
        _refuse_dtype(tensor, op)
        result = self._outgoing(tensor)
        if tensor.dtype is torch.bool:
            result = result.to(torch.uint8)
        with self._explained("all_reduce"):
            dist.all_reduce(result, _OPS[op])
        if op is ReduceOp.MEAN:
            result.div_(self._world.size)
        return result.to(tensor.device, tensor.dtype)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor per rank; the first dimension may differ.

        Raises:
            DataError: Other dimensions differ.
        """
        rows = tensor.shape[0] if tensor.dim() else 1
        mine = torch.tensor([tensor.dim(), rows, math.prod(tensor.shape[1:])], dtype=torch.int64)
        shapes = [shape.tolist() for shape in self._gather_alike(mine)]
        if len({(dims, size) for dims, _, size in shapes}) > 1:
            raise DataError(
                "all_gather needs tensors that differ in the first dimension only; "
                f"(dimensions, rows, elements in a row) by rank are {shapes}.",
                "Pad or flatten them to one shape first.",
            )
        if len({count for _, count, _ in shapes}) == 1:
            return self._gather_alike(tensor)
        longest = max(count for _, count, _ in shapes)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[:rows] = tensor
        return [
            part[:count]
            for part, (_, count, _) in zip(self._gather_alike(padded), shapes, strict=True)
        ]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank ``source``."""
        _refuse_source(source, self._world.size)
        result = self._outgoing(tensor)
        with self._explained("broadcast"):
            dist.broadcast(_bytes_of(result), source)
        return result.to(tensor.device)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object of rank ``source``, through pickle: plain values, not modules or tensors.

        Raises:
            UnsupportedError: The object does not pickle. Every rank raises it, so that none waits.
        """
        _refuse_source(source, self._world.size)
        here = self._world.rank == source
        data, cause = _pickled(value) if here else (b"", None)
        size = int(self.broadcast(torch.tensor(-1 if cause else len(data)), source))
        if size < 0:
            raise UnsupportedError(
                f"Rank {source} was to send an object to the others, and it does not pickle"
                + (f": it is a {type(value).__name__}." if here else "."),
                "Send plain values: numbers, strings, lists and dictionaries of them.",
            ) from cause
        # frombuffer shares memory and wants it writable, which bytes are not.
        buffer = bytearray(data) if here else bytearray(size)
        received = self.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), source)
        # What is unpickled comes from a rank of this very run.
        return value if here else pickle.loads(bytes(received.tolist()))  # noqa: S301

    def barrier(self) -> None:
        """Return once every rank has called it."""
        with self._explained("barrier"):
            if self._device is not None and self._device.index is not None:
                dist.barrier(device_ids=[self._device.index])
            else:
                dist.barrier()

    def side_channel(self) -> StoreSideChannel:
        """A new connection to the store, safe to use in a thread of its own.

        Raises:
            ClusterError: The store cannot be reached.
        """
        return StoreSideChannel(self._world, self._rendezvous, self._generation)

    def set_timeout(self, seconds: float) -> None:
        """How long an operation that begins from now on may take before it fails."""
        self._timeout = timedelta(seconds=seconds)
        set_group_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
        if set_group_timeout is not None and dist.is_initialized():
            set_group_timeout(self._timeout)

    def abort(self) -> None:
        """End every operation of this rank with an error, also one that a thread waits in.

        Connections of process groups that others made are not known here and stay.
        """
        self._aborted = True
        group = dist.group.WORLD if dist.is_initialized() else None
        if self._owns_group and group is not None and not self._closed:
            abort_group(group, self._sockets)

    def close(self) -> None:
        """Leave the process group, if this object made it. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _connect(self, *, hosts: bool) -> None:
        world = self._world
        key = (world.address, world.port, world.restarts)
        with _rendezvous(world, "the ranks did not find each other"):
            store, uses = _STORES.get(key, (None, 0))
            if store is None:
                store = TCPStore(
                    world.address,
                    world.port,
                    world.size if hosts else None,
                    is_master=hosts,
                    timeout=self._rendezvous,
                    wait_for_workers=False,
                )
            _STORES[key] = (store, uses + 1)
            # Ranks use the store equally often, so that they agree on this name.
            mine = PrefixStore(f"drivetrain/{self._generation}/{uses}", store)
            _meet(mine, world, self._rendezvous)
            before = open_sockets()
            dist.init_process_group(
                self._backend,
                store=mine,
                rank=world.rank,
                world_size=world.size,
                timeout=self._timeout,
            )
            self._sockets = open_sockets() - before

    def _gather_alike(self, tensor: Tensor) -> list[Tensor]:
        sent = self._outgoing(tensor)
        parts = [torch.empty_like(sent) for _ in range(self._world.size)]
        with self._explained("all_gather"):
            dist.all_gather([_bytes_of(part) for part in parts], _bytes_of(sent))
        return [part.to(tensor.device) for part in parts]

    def _outgoing(self, tensor: Tensor) -> Tensor:
        """A contiguous copy where the backend wants it: the caller's tensor is left as it was."""
        return tensor.detach().to(
            self._device or tensor.device, copy=True, memory_format=torch.contiguous_format
        )

    @contextmanager
    def _explained(self, operation: str) -> Iterator[None]:
        if self._closed:
            raise ClusterError(
                f"{operation} was called after the collectives were closed.",
                "Communicate before the end of the run.",
            )
        if self._aborted:
            raise ClusterError(
                f"{operation} was called after a failure had cut the connections of rank "
                f"{self._world.rank}.",
                "Look for the first error of the run; start all processes again.",
            )
        try:
            yield
        except RuntimeError as error:
            text = str(error).strip().splitlines()
            raise ClusterError(
                f"{operation} did not complete on rank {self._world.rank} of {self._world.size}"
                + (f" ({text[0]})." if text else "."),
                "Look for the first error of the other ranks: one that ended stops all; check that "
                "all call the same operation with the same shape and dtype.",
            ) from error


class StoreSideChannel:
    """A small store beside the collectives, over a connection of its own."""

    def __init__(self, world: World, timeout: timedelta, generation: int = 0) -> None:
        self._world = world
        self._prefix = f"drivetrain/{generation}/side/"
        # A client answers one call at a time, also when two threads share this object.
        self._lock = threading.Lock()
        with _rendezvous(world, "the side channel could not be opened"):
            self._store: Store | None = TCPStore(
                world.address,
                world.port,
                None,
                is_master=False,
                timeout=timeout,
                wait_for_workers=False,
            )

    def post(self, key: str, value: bytes) -> None:
        """Publish a value under a key; a later post replaces it."""
        with self._lock, self._told():
            # The store takes text, and hexadecimal digits keep any bytes.
            self._open().set(self._prefix + key, value.hex())

    def peek(self, key: str) -> bytes | None:
        """The value under ``key``, or None when nobody has posted it. Never waits for one."""
        with self._lock, self._told():
            store = self._open()
            if not store.check([self._prefix + key]):
                return None
            return bytes.fromhex(store.get(self._prefix + key).decode())

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        with self._lock:
            self._store = None

    def _open(self) -> Store:
        if self._store is None:
            raise ClusterError(
                "The side channel was used after it was closed.", "Ask for a new one."
            )
        return self._store

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ClusterError(
                f"The store at {self._world.address}:{self._world.port} does not answer rank "
                f"{self._world.rank}.",
                "Look at the process that hosts it: rank 0, or torchrun's agent, has ended.",
            ) from error


def _meet(store: Store, world: World, timeout: timedelta) -> None:
    """Wait until every rank is there, so that those who are missing can be named.

    By asking again and again: Python runs signal handlers in between, so Ctrl-C need not wait.
    """
    store.set(f"rank/{world.rank}", socket.gethostname())
    deadline = time.monotonic() + timeout.total_seconds()
    ranks = [f"rank/{rank}" for rank in range(world.size)]
    pause = _SHORTEST_PAUSE
    while not store.check(ranks):
        if time.monotonic() > deadline:
            raise _missing(store, world)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _missing(store: Store, world: World) -> ClusterError:
    came = {rank for rank in range(world.size) if store.check([f"rank/{rank}"])}
    missing = [rank for rank in range(world.size) if rank not in came]
    hosts = sorted({store.get(f"rank/{rank}").decode() for rank in came})
    return ClusterError(
        f"Rank {world.rank} waited at {world.address}:{world.port} for a world of "
        f"{world.size}; these ranks did not come: {missing}. The {len(came)} that came run on "
        f"{', '.join(hosts)}.",
        "Check that their processes were started with the same address and port, and that they "
        "can reach that host.",
    )


def _seconds(given: float | None, env: Mapping[str, str], variable: str, usual: float) -> timedelta:
    """A time that is given, or set in the environment, or the usual one."""
    text = env.get(variable, "") if given is None else str(given)
    try:
        seconds = float(text) if text else usual
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigurationError(
            f"{variable}={text!r} was set.", "Give a number of seconds, more than 0."
        )
    return timedelta(seconds=seconds)


@contextmanager
def _rendezvous(world: World, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ClusterError(
            f"Rank {world.rank} of {world.size}: {what} at {world.address}:{world.port}.",
            f"Check that all {world.size} processes were started and have the same address and "
            "port, that the host is reachable from each machine, and that nothing else uses the "
            "port.",
        ) from error


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: all backends carry bytes, but not all carry all dtypes."""
    return tensor.view(-1).view(torch.uint8)


def _pickled(value: Any) -> tuple[bytes, Exception | None]:
    try:
        return pickle.dumps(value), None
    except Exception as error:  # noqa: BLE001 - pickling runs any code; the caller raises it
        return b"", error


def _refuse_dtype(tensor: Tensor, op: ReduceOp) -> None:
    if op is ReduceOp.MEAN and not (tensor.is_floating_point() or tensor.is_complex()):
        raise UnsupportedError(
            f"The mean over ranks of {tensor.dtype} was asked for; a mean of integers is not one.",
            "Convert to a floating dtype first, or ask for the sum.",
        )
    if op is ReduceOp.SUM and tensor.dtype is torch.bool:
        raise UnsupportedError(
            "The sum over ranks of torch.bool was asked for, which would not fit in it.",
            "Use ReduceOp.MAX for 'any', ReduceOp.MIN for 'all', or convert to integers.",
        )


def _refuse_source(source: int, size: int) -> None:
    if not 0 <= source < size:
        raise ConfigurationError(
            f"A broadcast from rank {source} was asked for in a world of {size}.",
            f"Use a rank from 0 to {size - 1}.",
        )
