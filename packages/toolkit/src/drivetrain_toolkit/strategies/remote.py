"""DDP with ``torch.distributed.rpc`` beside it, for code that calls functions on other ranks."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain_interfaces import ClusterError, ConfigurationError

from drivetrain_toolkit.collectives import AGENT_STORE
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.strategies.ddp import DDPOptions, DDPStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@dataclass(frozen=True)
class _RPCOptions(DDPOptions):
    rpc_timeout_s: float = 60.0
    worker_threads: int = 16


class RPCStrategy(DDPStrategy):
    """DDP, and remote procedure calls between the ranks from ``prepare`` to ``close``.

    Ranks are called ``worker0``, ``worker1`` and so on. In a world of one there is nobody to call.

    Args:
        rpc_timeout_s: Seconds that a call may take, and that ranks wait for each other at the end.
        worker_threads: Threads that answer calls.
        options: Those of ``DDPStrategy``.
    """

    name = "rpc"
    capabilities: ClassVar = CAPABILITIES["rpc"]

    _connected = False

    def __init__(
        self, *, rpc_timeout_s: float = 60.0, worker_threads: int = 16, **options: Any
    ) -> None:
        super().__init__(**options)
        mine = {item.name: getattr(self._options, item.name) for item in fields(DDPOptions)}
        self._options = _RPCOptions(
            **mine, rpc_timeout_s=rpc_timeout_s, worker_threads=worker_threads
        )

    def prepare(self, module: nn.Module) -> nn.Module:
        """As for ``DDPStrategy``; afterwards ranks can call each other."""
        self._connect()
        return super().prepare(module)

    def close(self) -> None:
        """Wait until all calls are answered, and disconnect; at once if an error ends the run."""
        if self._connected:
            self._connected = False
            rpc = _rpc()
            rpc.shutdown(graceful=sys.exc_info()[0] is None, timeout=self._options.rpc_timeout_s)
        super().close()

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()
        if self._options.rpc_timeout_s <= 0:
            raise ConfigurationError(
                f"rpc_timeout_s={self._options.rpc_timeout_s} was asked of the strategy 'rpc'.",
                "Give seconds above 0.",
            )

    def _connect(self) -> None:
        world = self.context.world
        if world.size == 1 or self._connected:
            return
        rpc = _rpc()
        port = None
        if world.is_main:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
        port = self.context.collectives.broadcast_object(port)
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=self._options.worker_threads,
            rpc_timeout=self._options.rpc_timeout_s,
            init_method=f"tcp://{world.address}:{port}",
        )
        try:
            with _own_store():
                rpc.init_rpc(
                    f"worker{world.rank}",
                    rank=world.rank,
                    world_size=world.size,
                    rpc_backend_options=options,
                )
        except RuntimeError as error:
            raise ClusterError(
                f"Rank {world.rank} of {world.size} could not start remote procedure calls at "
                f"{world.address}:{port}.",
                "Check that no rank has started torch.distributed.rpc itself.",
            ) from error
        self._connected = True


@contextmanager
def _own_store() -> Iterator[None]:
    """Let rank 0 host the store of the address that was agreed.

    Under torchrun torch takes every store for that of torchrun's agent, whatever its address: then
    all ranks would wait for somebody else to host it.
    """
    told = os.environ.pop(AGENT_STORE, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[AGENT_STORE] = told


def _rpc() -> Any:
    with warnings.catch_warnings():
        # The module compiles scripts, which newer versions of torch warn about.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed import rpc
    return rpc
