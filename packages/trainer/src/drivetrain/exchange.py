"""Small host values between ranks, on top of the contract's five collectives."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_interfaces import Collectives, World

_ROW = 512


def gather_objects(value: Any, collectives: Collectives, device: torch.device) -> list[Any]:
    """One value per rank, in rank order. Pickles, but only between processes of one run."""
    payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    parts = collectives.all_gather(payload)
    return [pickle.loads(part.cpu().numpy().tobytes()) for part in parts]  # noqa: S301 - own ranks


def gather_numbers(
    key: int, numbers: Sequence[float], collectives: Collectives, world: World, device: torch.device
) -> list[list[float]] | None:
    """The numbers of every rank in one collective, or None when the ranks' keys differ.

    Rows have a fixed length, so that ranks that disagree find out instead of waiting for ever.

    Args:
        key: What the numbers mean, such as a hash of their names; below 2**53.
        numbers: This rank's values; every rank with the same key has equally many.
        collectives: Communication.
        world: This process's place.
        device: Where collectives take their tensors.
    """
    rows = torch.zeros(world.size, _ROW, dtype=torch.float64)
    fits = len(numbers) <= _ROW - 2
    rows[world.rank, 0] = float(key if fits else -1 - world.rank)
    if fits:
        rows[world.rank, 2 : 2 + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    everyone = collectives.all_reduce(rows.to(device), ReduceOp.SUM).cpu()
    if (everyone[:, 0] != everyone[0, 0]).any() or everyone[0, 0] < 0:
        return None
    gathered: list[list[float]] = everyone[:, 2 : 2 + len(numbers)].tolist()
    return gathered
