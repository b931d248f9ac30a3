"""Communication between the processes of a run."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


class ReduceOp(str, Enum):
    """How values of several ranks become one."""

    SUM = "sum"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"


@runtime_checkable
class Collectives(Protocol):
    """What every process calls together, in the same order. With one process, the identity."""

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> torch.Tensor:
        """The reduction over all ranks, same shape and dtype; ``tensor`` is left as it was."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """One tensor per rank, in rank order; the first dimension may differ between ranks."""
        ...

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The tensor of rank ``source``; on the others ``tensor`` gives shape and dtype."""
        ...

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object of rank ``source``. For small things at set-up, never per step."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called it."""
        ...


@runtime_checkable
class SideChannel(Protocol):
    """A small store beside the collectives that any one rank may use at any time.

    It is how a rank says "I was told to stop" or "I failed" while the others are busy.
    """

    def post(self, key: str, value: bytes) -> None:
        """Publish a value under a key; a later post replaces it."""
        ...

    def peek(self, key: str) -> bytes | None:
        """The value under ``key``, or None when nobody has posted it. Never waits for one."""
        ...

    def close(self) -> None:
        """Disconnect. Safe to call twice."""
        ...


@runtime_checkable
class SupportsSideChannel(Protocol):
    """Collectives that also have a side channel."""

    def side_channel(self) -> SideChannel:
        """A new connection, safe to use in a thread of its own."""
        ...


@runtime_checkable
class SupportsAbort(Protocol):
    """Collectives that can be cut while another thread waits in them."""

    def abort(self) -> None:
        """End every operation of this rank, here and on its peers, with an error.

        Nothing can be communicated afterwards. Safe to call twice, and from any thread.
        """
        ...


@runtime_checkable
class SupportsTimeout(Protocol):
    """Collectives whose patience can be set."""

    def set_timeout(self, seconds: float) -> None:
        """How long an operation that begins from now on may take before it fails."""
        ...


@runtime_checkable
class SupportsClose(Protocol):
    """A part that holds something open."""

    def close(self) -> None:
        """Release it. Safe to call twice."""
        ...
