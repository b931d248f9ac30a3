"""The module ``torch.<name>``: what torch and programs ask of a device type by its name."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from drivetrain_conformance.simulated.native import Native

    Where = torch.device | str | int | None


def make(name: str, native: Native) -> ModuleType:
    """The module ``torch.<name>`` over the compiled library.

    Args:
        name: What the device type is called.
        native: The library.
    """
    module = ModuleType(f"torch.{name}", "The simulated device.")
    parts: list[dict[str, Any]] = [
        _devices(name, native),
        _streams(name),
        _random(name, native),
        _memory(name, native),
    ]
    for part in parts:
        vars(module).update(part)
    sys.modules[module.__name__] = module
    return module


def _index(name: str, where: Where) -> int:
    """From the ways in which people name a device to its number; None is the current one."""
    import torch

    if isinstance(where, int):
        return where
    device = torch.device(name if where is None else where)
    if device.type != name:
        raise ValueError(f"torch.{name} was asked about {str(device)!r}, which is another device")
    current: int = torch.ops.drivetrain_sim.current_device()
    return current if device.index is None else device.index


def _devices(name: str, native: Native) -> dict[str, Any]:
    import torch

    library = torch.ops.drivetrain_sim

    @contextmanager
    def device(where: Where) -> Iterator[None]:
        before = library.current_device()
        library.set_device(_index(name, where))
        try:
            yield
        finally:
            library.set_device(before)

    def amp_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, *([torch.float16] if native.get("fp16") else [])]

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,  # what torch.utils.checkpoint looks at
        "init": lambda: None,
        "_lazy_init": lambda: None,
        # A forked process has a copy of the memory and of the library, so nothing is lost.
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: native.get("devices"),
        "current_device": library.current_device,
        "set_device": lambda where: library.set_device(_index(name, where)),
        "device": device,
        "get_device_name": lambda where=None: f"Simulated device {_index(name, where)}",
        "is_bf16_supported": lambda: True,
        "get_amp_supported_dtype": amp_dtypes,
    }


def _streams(name: str) -> dict[str, Any]:
    import torch

    def here(where: Where) -> torch.device:
        return torch.device(name, _index(name, where))

    def synchronize(where: Where = None) -> None:
        torch.accelerator.synchronize(here(where))

    def current_stream(where: Where = None) -> torch.Stream:
        return torch.accelerator.current_stream(here(where))

    @contextmanager
    def stream(wanted: torch.Stream | None) -> Iterator[None]:
        if wanted is None:
            yield
            return
        before = torch.accelerator.current_stream(wanted.device)
        torch.accelerator.set_stream(wanted)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    return {
        "Stream": torch.Stream,
        "Event": torch.Event,
        "synchronize": synchronize,
        "current_stream": current_stream,
        "set_stream": torch.accelerator.set_stream,
        "stream": stream,
    }


def _random(name: str, native: Native) -> dict[str, Any]:
    import torch

    library = torch.ops.drivetrain_sim

    def everywhere(call: Callable[[int], Any]) -> list[Any]:
        return [call(index) for index in range(native.get("devices"))]

    def get_rng_state(where: Where = None) -> torch.Tensor:
        state: torch.Tensor = library.rng_state(_index(name, where))
        return state

    def set_rng_state(state: torch.Tensor, where: Where = None) -> None:
        library.set_rng_state(state.cpu(), _index(name, where))

    def set_rng_state_all(states: list[torch.Tensor]) -> None:
        for index, state in enumerate(states):
            set_rng_state(state, index)

    return {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: everywhere(get_rng_state),
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": lambda seed: library.seed(int(seed), _index(name, None)),
        "manual_seed_all": lambda seed: everywhere(lambda each: library.seed(int(seed), each)),
        "initial_seed": lambda: library.initial_seed(_index(name, None)),
    }


def _memory(name: str, native: Native) -> dict[str, Any]:
    def memory_allocated(where: Where = None) -> int:
        return native.get("allocated", _index(name, where))

    def max_memory_allocated(where: Where = None) -> int:
        return native.get("peak", _index(name, where))

    def reset_peak_memory_stats(where: Where = None) -> None:
        native.set("peak", memory_allocated(where), _index(name, where))

    def mem_get_info(where: Where = None) -> tuple[int, int]:
        limit = native.get("memory_limit", _index(name, where)) or 2**40
        return limit - memory_allocated(where), limit

    return {
        "memory_allocated": memory_allocated,
        "max_memory_allocated": max_memory_allocated,
        "reset_peak_memory_stats": reset_peak_memory_stats,
        "mem_get_info": mem_get_info,
        "empty_cache": lambda: None,
    }
