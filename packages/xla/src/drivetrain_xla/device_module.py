"""What torch looks for as ``torch.xla``: current device and random numbers.

torch_xla brings no such module, and without it ``torch.utils.checkpoint``,
``torch.random.fork_rng`` and ``torch.get_device_module`` fail on XLA devices.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

NAME = "xla"
_SEED_BYTES = 8


def register() -> None:
    """Make this module ``torch.xla``, unless something else is by now."""
    if not hasattr(torch, NAME):
        register_module = torch._register_device_module  # noqa: SLF001 - made for backends
        register_module(NAME, sys.modules[__name__])  # type: ignore[no-untyped-call]


def is_available() -> bool:
    """Always: the module is registered once the runtime is open."""
    return True


def is_initialized() -> bool:
    """Always, for the same reason."""
    return True


_initialized = True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """Devices that this process can name; one where SPMD makes one of all."""
    import torch_xla

    return len(torch_xla.devices())


def current_device() -> int:
    """Index of the device that new tensors go to."""
    import torch_xla

    return torch_xla.device().index or 0


def set_device(wanted: Any) -> None:
    """Make a device current, given by index, name or ``torch.device``."""
    import torch_xla

    torch_xla.device(_index(wanted))


class device:  # noqa: N801 - the name that torch looks for
    """A device that is current for the length of a ``with`` block.

    Args:
        wanted: Index, name or ``torch.device``; None changes nothing.
    """

    def __init__(self, wanted: Any) -> None:
        self._wanted = _index(wanted)
        self._before = -1

    def __enter__(self) -> None:
        self._before = current_device()
        if self._before != self._wanted:
            set_device(self._wanted)

    def __exit__(self, *exc: object) -> None:
        if self._before != self._wanted:
            set_device(self._before)


def get_rng_state(wanted: Any = None) -> Tensor:
    """The seed of a device's generator, as eight bytes on the host."""
    import torch_xla.core.xla_model as xm

    seed: int = xm.get_rng_state(f"{NAME}:{_index(wanted)}")
    return torch.tensor(list(seed.to_bytes(_SEED_BYTES, "little")), dtype=torch.uint8)


def set_rng_state(state: Tensor, wanted: Any = None) -> None:
    """Restore what ``get_rng_state`` returned."""
    import torch_xla.core.xla_model as xm

    xm.set_rng_state(int.from_bytes(bytes(state.tolist()), "little"), f"{NAME}:{_index(wanted)}")


def manual_seed(seed: int) -> None:
    """Seed the generator of the current device."""
    import torch_xla

    torch_xla.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices that this process can name."""
    import torch_xla

    for each in torch_xla.devices():
        torch_xla.manual_seed(seed, str(each))


def synchronize(_wanted: Any = None) -> None:
    """Return once all work queued on the devices of this process has finished."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    torch_xla.sync()
    xm.wait_device_ops()


def _index(wanted: Any) -> int:
    if wanted is None:
        return current_device()
    if isinstance(wanted, int):
        return current_device() if wanted < 0 else wanted
    index = torch.device(wanted).index
    return current_device() if index is None else index
