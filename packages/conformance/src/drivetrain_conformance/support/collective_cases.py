"""What ranks do together with collectives alone. Tests compare the answers with plain Python."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import DrivetrainError, ReduceOp, SupportsClose, SupportsSideChannel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from drivetrain_interfaces import World

    from drivetrain_conformance.support.ranks import Rank

#: Seconds to wait for what another rank posts.
PATIENCE_S = 30.0


def values(rank: int, kind: str) -> list[float]:
    """The numbers of one rank, exact in every dtype."""
    if kind == "bool":
        return [float(rank % 2), 1.0, 0.0]
    if kind.startswith("uint"):
        return [float(rank + 1), 3.0, float(5 * rank)]
    return [float(rank + 1), -3.0, float((-2) ** rank), 0.5 if "float" in kind else 1.0]


def told(error: DrivetrainError) -> tuple[str, str]:
    """An error as an answer."""
    return type(error).__name__, str(error)


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """The error that a call raises, or that it raised none."""
    try:
        call()
    except DrivetrainError as error:
        return told(error)
    return "nothing", "nothing was raised"


def dtype_works(rank: Rank, dtype: str) -> bool:
    """Whether the device holds such tensors at all."""
    try:
        torch.ones(2).to(getattr(torch, dtype)).to(rank.device)
    except Exception:  # noqa: BLE001 - devices say so in many ways
        return False
    return True


def reduce_all(rank: Rank, dtype: str) -> dict[str, Any] | None:
    """Every operation that a dtype allows; None if the device does not hold it."""
    if not dtype_works(rank, dtype):
        return None
    kind = getattr(torch, dtype)
    mine = torch.tensor(values(rank.world.rank, dtype)).to(kind).to(rank.device)
    kept = mine.clone()
    answer: dict[str, Any] = {}
    for op in ReduceOp:
        if not _allowed(kind, op):
            answer[op.value] = refusal(lambda op=op: rank.collectives.all_reduce(mine, op))  # type: ignore[misc]
            continue
        made = rank.collectives.all_reduce(mine, op)
        answer[op.value] = made.double().tolist()
        answer["same kind"] = made.dtype is kind and made.shape == mine.shape
        answer["same device"] = made.device == mine.device
    answer["untouched"] = bool(torch.equal(mine, kept))
    return answer


def _allowed(dtype: torch.dtype, op: ReduceOp) -> bool:
    if op is ReduceOp.MEAN:
        return dtype.is_floating_point
    return not (op is ReduceOp.SUM and dtype is torch.bool)


def reduce_shapes(rank: Rank) -> dict[str, Any]:
    """A scalar, an empty tensor, one that is not contiguous, and a larger one."""
    base = torch.arange(6.0, device=rank.device).reshape(2, 3) + rank.world.rank
    tensors = {
        "scalar": base[0, 1],
        "empty": base[:0],
        "transposed": base.t(),
        "large": torch.arange(50_000.0, device=rank.device) % 7 + rank.world.rank,
    }
    made = {name: rank.collectives.all_reduce(t) for name, t in tensors.items()}
    return {
        name: (list(t.shape) == list(tensors[name].shape), t.cpu().flatten().tolist())
        for name, t in made.items()
    }


def reduce_with_gradient(rank: Rank) -> tuple[bool, float]:
    """A tensor that is part of a graph: the graph stays as it was."""
    leaf = torch.ones(2, device=rank.device, requires_grad=True)
    made = rank.collectives.all_reduce((leaf * 3).sum())
    (leaf * 2).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return bool(made.requires_grad), float(leaf.grad.sum())


def gather(rank: Rank, dtype: str, rows: list[int]) -> dict[str, Any] | None:
    """Tensors with these many rows, by rank."""
    if not dtype_works(rank, dtype):
        return None
    me = rank.world.rank
    mine = torch.full((rows[me], 3), float(me + 1)).to(getattr(torch, dtype)).to(rank.device)
    parts = rank.collectives.all_gather(mine)
    return {
        "shapes": [list(part.shape) for part in parts],
        "values": [part.double().flatten().tolist() for part in parts],
        "kinds": all(part.dtype is mine.dtype for part in parts),
        "same device": all(part.device == mine.device for part in parts),
        "untouched": list(mine.shape) == [rows[me], 3],
    }


def odd_tensors(rank: Rank) -> dict[str, Any]:
    """Gather and broadcast what is not contiguous, part of a graph, or a view."""
    base = torch.arange(6.0, device=rank.device).reshape(2, 3) + 10 * rank.world.rank
    leaf = base.clone().requires_grad_()
    tensors = {"transposed": base.t(), "column": base[:, 1], "graph": leaf * 1.0}
    answer: dict[str, Any] = {}
    for name, tensor in tensors.items():
        parts = rank.collectives.all_gather(tensor)
        answer[f"gathered {name}"] = [part.detach().cpu().tolist() for part in parts]
        made = rank.collectives.broadcast(tensor, rank.world.size - 1)
        answer[f"broadcast {name}"] = made.detach().cpu().tolist()
    return answer


def gather_scalars(rank: Rank) -> list[float]:
    """One number from each rank."""
    mine = torch.tensor(float(rank.world.rank), device=rank.device)
    parts = rank.collectives.all_gather(mine)
    assert all(part.dim() == 0 for part in parts), "scalars stay scalars"
    return [float(part) for part in parts]


def gather_misfits(rank: Rank) -> tuple[str, str]:
    """Rows of different widths."""
    mine = torch.zeros(2, 3 + rank.world.rank, device=rank.device)
    return refusal(lambda: rank.collectives.all_gather(mine))


def broadcast(rank: Rank, source: int, dtype: str) -> dict[str, Any] | None:
    """The tensor of one rank."""
    if not dtype_works(rank, dtype):
        return None
    mine = torch.full((2, 2), float(rank.world.rank + 1)).to(getattr(torch, dtype))
    mine = mine.to(rank.device)
    kept = mine.clone()
    made = rank.collectives.broadcast(mine, source)
    return {
        "values": made.double().flatten().tolist(),
        "same kind": made.dtype is mine.dtype and made.shape == mine.shape,
        "untouched": bool(torch.equal(mine, kept)),
    }


def broadcast_objects(rank: Rank, source: int) -> Any:
    """Plain values of one rank."""
    mine = {"from": rank.world.rank, "list": [1, None, "x" * 1000], "nested": {"a": (1.5, True)}}
    return rank.collectives.broadcast_object(mine, source)


def broadcast_what_does_not_pickle(rank: Rank) -> tuple[tuple[str, str], Any]:
    """A function without a name; and afterwards the ranks still understand each other."""
    value = (lambda: None) if rank.world.rank == 0 else None
    answer = refusal(lambda: rank.collectives.broadcast_object(value, 0))
    return answer, rank.collectives.broadcast_object(rank.world.rank, 0)


def bad_sources(rank: Rank) -> list[tuple[str, str]]:
    """Sources before and beyond the world."""
    tensor = torch.ones(1, device=rank.device)
    return [
        refusal(lambda s=s, c=c: c(s))  # type: ignore[misc]
        for s in (-1, rank.world.size)
        for c in (
            lambda source: rank.collectives.broadcast(tensor, source),
            lambda source: rank.collectives.broadcast_object(1, source),
        )
    ]


def meet(rank: Rank, folder: Path) -> list[str]:
    """Write a file, meet at a barrier, and list the folder. The last rank comes late."""
    if rank.world.rank == rank.world.size - 1:
        time.sleep(0.3)  # so that a rank that does not wait is seen
    (folder / f"rank-{rank.world.rank}").write_text("here", encoding="utf-8")
    rank.collectives.barrier()
    return sorted(path.name for path in folder.iterdir())


def close_and_connect_again(rank: Rank) -> dict[str, Any]:
    """Close twice, try to communicate, connect again."""
    first = rank.collectives
    if not isinstance(first, SupportsClose):
        return {"closes": False}
    first.barrier()
    first.close()
    first.close()
    tensor = torch.ones(1, device=rank.device)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: first.all_reduce(tensor),
        "all_gather": lambda: first.all_gather(tensor),
        "broadcast": lambda: first.broadcast(tensor),
        "broadcast_object": lambda: first.broadcast_object(1),
        "barrier": first.barrier,
    }
    after = {name: refusal(call) for name, call in calls.items()}
    answer: dict[str, Any] = {"closes": True, "after": after}
    rank.disconnect()
    answer["again"] = float(rank.collectives.all_reduce(tensor))
    return answer


def join_a_group(rank: Rank, port: int) -> dict[str, Any]:
    """A process group that the user made is joined and not ended."""
    import torch.distributed as dist

    rank.collectives.barrier()
    rank.disconnect()
    if dist.is_initialized():
        return {"still there": True}
    dist.init_process_group(
        rank.backend.accelerator().facts.collective_backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank.world.rank,
        world_size=rank.world.size,
    )
    total = float(rank.collectives.all_reduce(torch.ones(1, device=rank.device)))
    rank.collectives.barrier()
    rank.disconnect()
    kept = dist.is_initialized()
    if kept:
        dist.destroy_process_group()
    return {"still there": False, "total": total, "kept": kept}


def side_channel(rank: Rank) -> dict[str, Any] | None:
    """Post and peek; None without a side channel."""
    collectives = rank.collectives
    if not isinstance(collectives, SupportsSideChannel):
        return None
    channel = collectives.side_channel()
    answer: dict[str, Any] = {"absent": channel.peek("never-posted")}
    channel.post(f"mine-{rank.world.rank}", b"first")
    channel.post(f"mine-{rank.world.rank}", bytes(range(256)))
    collectives.barrier()
    other = (rank.world.rank + 1) % rank.world.size
    answer["other"] = channel.peek(f"mine-{other}")
    collectives.barrier()
    channel.close()
    channel.close()
    return answer


def side_channel_beside_a_collective(rank: Rank) -> bool | None:
    """Ranks but the first wait at a barrier, and answer from a thread meanwhile."""
    collectives = rank.collectives
    if not isinstance(collectives, SupportsSideChannel):
        return None
    channel = collectives.side_channel()
    heard: list[bool] = []

    def listen(key: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not heard:
            if channel.peek(key) is not None:
                heard.append(True)
            time.sleep(0.01)  # polling, as a stop thread does

    if rank.world.rank == 0:
        channel.post("call", b"?")
        for other in range(1, rank.world.size):
            listen(f"answer-{other}")
            if heard and other < rank.world.size - 1:
                heard.clear()
        collectives.barrier()
    else:

        def answer() -> None:
            listen("call")
            channel.post(f"answer-{rank.world.rank}", b"!")

        thread = threading.Thread(target=answer)
        thread.start()
        collectives.barrier()
        thread.join(PATIENCE_S)
    channel.close()
    return bool(heard)


def occupied_port(rank: Rank, port: int) -> tuple[str, str] | None:
    """Rank 0 cannot host the store where somebody else listens."""
    if rank.world.rank != 0:
        return None
    assert rank.accelerator
    world: World = type(rank.world)(
        0, rank.world.size, 0, rank.world.size, address="127.0.0.1", port=port
    )
    return refusal(lambda: rank.backend.collectives(world))


def last_rank_dies(rank: Rank) -> dict[str, Any]:
    """The last rank ends without a word, the others are in a collective."""
    tensor = torch.ones(4, device=rank.device)
    rank.collectives.all_reduce(tensor)
    if rank.world.rank == rank.world.size - 1:
        os._exit(7)
    started = time.monotonic()
    answer = refusal(lambda: [rank.collectives.all_reduce(tensor) for _ in range(3)])
    return {"answer": answer, "seconds": time.monotonic() - started}


def still_in_step(rank: Rank) -> float:
    """The sum of all ranks' numbers: wrong if something before left a collective unmatched."""
    rank.collectives.barrier()
    return float(rank.collectives.all_reduce(torch.tensor(float(rank.world.rank + 1))))
