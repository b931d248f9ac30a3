"""Communication through Horovod: among all ranks, or among those of a process set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError, DataError, ReduceOp, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from torch import Tensor

#: What Horovod reduces and sends.
_DTYPES = frozenset({torch.float16, torch.float32, torch.float64, torch.int32, torch.int64})
#: Process sets by their ranks. One cannot be made twice, and each lives as long as Horovod does.
_SETS: dict[tuple[int, ...], Any] = {}


class HorovodCollectives:
    """``Collectives`` by Horovod. Messages of two objects never meet, whatever their order.

    Args:
        hvd: Horovod, started.
        ranks: Which ranks take part; None means all.
    """

    def __init__(self, hvd: ModuleType, ranks: Sequence[int] | None = None) -> None:
        self._hvd = hvd
        self.ranks = tuple(range(hvd.size())) if ranks is None else tuple(ranks)
        self._set = hvd.global_process_set if ranks is None else _SETS[self.ranks]
        self._prefix = "all" if ranks is None else "-".join(map(str, self.ranks))
        self._count = 0

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """The reduction over all of its ranks; ``tensor`` is left as it was.

        Raises:
            UnsupportedError: A dtype that Horovod does not reduce.
            DataError: A mean of integers.
        """
        self._refuse(tensor)
        if op is ReduceOp.MEAN and not tensor.is_floating_point():
            raise DataError(
                f"A mean over ranks was asked for, of {tensor.dtype}.", "Convert it, or use SUM."
            )
        names = {ReduceOp.SUM: "Sum", ReduceOp.MEAN: "Average"}
        how = getattr(self._hvd, names.get(op, op.name.capitalize()))
        made: Tensor = self._hvd.allreduce(
            tensor.detach(), op=how, name=self._name("reduce"), process_set=self._set
        )
        return made

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor per rank, in rank order; the first dimension may differ."""
        self._refuse(tensor)
        rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
        counts = self._gathered(torch.tensor([len(rows)]))
        parts = torch.split(self._gathered(rows), [int(n) for n in counts])
        return [part.reshape(()) if tensor.dim() == 0 else part for part in parts]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of rank ``source`` of these."""
        self._refuse(tensor)
        made: Tensor = self._hvd.broadcast(
            tensor.detach(), self.ranks[source], name=self._name("send"), process_set=self._set
        )
        return made

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object of rank ``source`` of these, by pickle."""
        return self._hvd.broadcast_object(
            value, self.ranks[source], name=self._name("object"), process_set=self._set
        )

    def barrier(self) -> None:
        """Return once every one of its ranks has called it."""
        self._hvd.barrier(process_set=self._set)

    def _gathered(self, tensor: Tensor) -> Tensor:
        made: Tensor = self._hvd.allgather(tensor, name=self._name("gather"), process_set=self._set)
        return made

    def _name(self, what: str) -> str:
        self._count += 1
        return f"drivetrain.{self._prefix}.{what}.{self._count}"

    def _refuse(self, tensor: Tensor) -> None:
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(
                f"A tensor of {tensor.dtype} was to be sent through Horovod, which does not.",
                "Convert it to torch.float32 or torch.int64.",
            )


def make_subgroup(hvd: ModuleType, ranks: Sequence[int]) -> HorovodCollectives | None:
    """Communication among some ranks, or None on a rank that is none of them; all ranks call it.

    Raises:
        ConfigurationError: Ranks that there are not, or not each once.
    """
    wanted = tuple(sorted(ranks))
    if (
        not wanted
        or len(set(wanted)) < len(wanted)
        or not 0 <= wanted[0] <= wanted[-1] < hvd.size()
    ):
        raise ConfigurationError(
            f"A sub-group of the ranks {list(ranks)} was asked for, in a world of {hvd.size()}.",
            f"Name some of the ranks 0 to {hvd.size() - 1}, each once.",
        )
    if len(wanted) == hvd.size():
        return HorovodCollectives(hvd)
    if wanted not in _SETS:
        _SETS[wanted] = hvd.add_process_set(list(wanted))
    return HorovodCollectives(hvd, wanted) if hvd.rank() in wanted else None


def forget_subgroups() -> None:
    """Let go of process sets, as when Horovod was started again with other ranks."""
    _SETS.clear()
