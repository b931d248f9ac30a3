"""What is on a device when its memory runs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from drivetrain_interfaces import DrivetrainError, SupportsMemoryStats
from torch import Tensor

from drivetrain_toolkit.trees import mapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from drivetrain_interfaces import Accelerator
    from torch import nn
    from torch.optim import Optimizer

_LARGEST = 5
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024


class DeviceMemoryError(DrivetrainError, torch.OutOfMemoryError):
    """A device has no memory left. Code that expects ``torch.OutOfMemoryError`` goes on working."""

    code: ClassVar[str] = "DT303"


@dataclass(frozen=True)
class Holding:
    """One tensor on the device, or what it will hold."""

    what: str
    name: str
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def explained(
    error: torch.OutOfMemoryError,
    doing: str,
    accelerator: Accelerator,
    device: torch.device,
    *,
    module: nn.Module | None = None,
    optimizers: Sequence[Optimizer] = (),
    batch: Any = None,
) -> DeviceMemoryError:
    """The error with what holds the memory.

    Args:
        error: Torch's.
        doing: What was going on, such as ``"a train step"``.
        accelerator: Asked for the use of memory, if it can tell.
        device: The device.
        module: Whose parameters and buffers may be there.
        optimizers: Whose state may be there.
        batch: What may be there of the data.
    """
    holdings = [*_of_module(module, device), *_of_optimizers(optimizers, module, device)]
    holdings += _of_batch(batch, device)
    lines = [f"{device} ran out of memory in {doing}: {str(error).splitlines()[0].rstrip('.')}."]
    lines += _totals(holdings, module, optimizers)
    lines += _use(accelerator, device, holdings)
    largest = sorted(holdings, key=lambda one: -one.size)[:_LARGEST]
    lines += [f"  {_sized(one.size)}: {_named(one)}" for one in largest]
    return DeviceMemoryError(
        "\n".join(lines) + "\n",
        "Use smaller batches with accumulate_grad_batches, precision='bf16-mixed', activation "
        "checkpointing, or a strategy that shards what is large.",
    )


def _of_module(module: nn.Module | None, device: torch.device) -> Iterator[Holding]:
    if module is None:
        return
    for name, parameter in module.named_parameters():
        yield from _holding("parameter", name, parameter, device)
    for name, buffer in module.named_buffers():
        yield from _holding("buffer", name, buffer, device)


def _of_optimizers(
    optimizers: Sequence[Optimizer], module: nn.Module | None, device: torch.device
) -> Iterator[Holding]:
    names = {id(p): name for name, p in module.named_parameters()} if module is not None else {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            owner = names.get(id(parameter), "a parameter")
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield from _holding("optimizer state", f"{key} of {owner}", value, device)


def _of_batch(batch: Any, device: torch.device) -> list[Holding]:
    found: list[Holding] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.extend(_holding("batch", "a tensor", value, device))
        return value

    mapped(batch, leaf)
    return found


def _holding(what: str, name: str, tensor: Tensor, device: torch.device) -> Iterator[Holding]:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a sharded tensor
    if local.device == device:
        yield Holding(what, name, local.nbytes, tuple(local.shape), local.dtype)


def _totals(
    holdings: Sequence[Holding], module: nn.Module | None, optimizers: Sequence[Optimizer]
) -> list[str]:
    sizes: dict[str, int] = {}
    for one in holdings:
        sizes[one.what] = sizes.get(one.what, 0) + one.size
    if module is not None and optimizers:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        sizes["gradients, when complete"] = sum(
            one.size for one in holdings if one.what == "parameter" and one.name in trained
        )
    text = ", ".join(f"{what} {_sized(size)}" for what, size in sizes.items())
    return [f"  there: {text}"] if text else []


def _use(accelerator: Accelerator, device: torch.device, holdings: Sequence[Holding]) -> list[str]:
    if not isinstance(accelerator, SupportsMemoryStats):
        return []
    stats = accelerator.memory_stats(device)
    rest = stats["allocated"] - sum(one.size for one in holdings)
    text = (
        f"  in all: {_sized(stats['allocated'])}, at most so far {_sized(stats['peak'])}; "
        f"{_sized(max(0, rest))} of it are results that backward needs, and the like"
    )
    return [text]


def _named(one: Holding) -> str:
    shape = "×".join(map(str, one.shape)) or "one number"
    return f"{one.what} {one.name} ({shape}, {str(one.dtype).removeprefix('torch.')})"


def _sized(size: float) -> str:
    for unit in _UNITS[:-1]:
        if size < _STEP:
            return f"{size:.0f} {unit}" if unit == _UNITS[0] else f"{size:.2f} {unit}"
        size /= _STEP
    return f"{size:.2f} {_UNITS[-1]}"
