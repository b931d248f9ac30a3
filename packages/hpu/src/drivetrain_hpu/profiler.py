"""``torch.profiler`` on Gaudi."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces import ConfigurationError

from drivetrain_hpu.bridge import load_bridge

if TYPE_CHECKING:
    from collections.abc import Callable

#: Which tool of the vendor records; it has to be the light one for torch's profiler to work.
VARIABLE: Final = "HABANA_PROFILE"
NEEDED: Final = "profile_api_light"
#: Fewer active steps than this have been seen to crash the vendor's tool.
LEAST_ACTIVE: Final = 3


def profile(
    *,
    wait: int = 1,
    warmup: int = 1,
    active: int = LEAST_ACTIVE,
    repeat: int = 1,
    on_trace_ready: Callable[[Any], None] | None = None,
    record_shapes: bool = False,
    profile_memory: bool = False,
    with_stack: bool = False,
) -> Any:
    """A profiler of the host and the device. Call its ``step()`` after each step.

    The bridge replaces torch's profiler, and names that were imported before keep the old one. So
    it is looked up here, after the bridge, and gets the arguments that the replacement has.

    Args:
        wait: Steps that are left out at first; 1 or more.
        warmup: Steps that are recorded and dropped; 1 or more.
        active: Steps that are recorded; 3 or more.
        repeat: How often all of this is done.
        on_trace_ready: Called with the profiler when a trace is there, as for torch's.
        record_shapes: Whether shapes of inputs are kept.
        profile_memory: Whether allocations are recorded.
        with_stack: Whether places in the source are recorded.

    Raises:
        ConfigurationError: Too few steps, or ``HABANA_PROFILE`` chooses another tool.
        UnavailableError: The bridge does not import.
    """
    if wait < 1 or warmup < 1 or active < LEAST_ACTIVE:
        raise ConfigurationError(
            f"profile(wait={wait}, warmup={warmup}, active={active}) was asked for, with which the "
            "vendor's tool has been seen to crash.",
            f"Use wait=1, warmup=1 and active={LEAST_ACTIVE}, or more.",
        )
    load_bridge()
    if os.environ.get(VARIABLE, NEEDED) != NEEDED:
        raise ConfigurationError(
            f"A profiler was asked for, and {VARIABLE}={os.environ[VARIABLE]!r} chooses another "
            "tool of the vendor.",
            f"Unset it before the program starts, or set it to {NEEDED}.",
        )
    torch_profiler: Any = import_module("torch.profiler")
    kinds = torch_profiler.ProfilerActivity
    return torch_profiler.profile(
        activities=[kinds.CPU, kinds.HPU],
        schedule=torch_profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=repeat),
        on_trace_ready=on_trace_ready,
        record_shapes=record_shapes,
        profile_memory=profile_memory,
        with_stack=with_stack,
    )
