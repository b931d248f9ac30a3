"""A simulated accelerator: a real ``torch.device`` whose memory is the host's.

It is as strict as hardware is: devices do not mix, and the host does not see its memory. It is as
weak as a test wants it: with little memory, without a format or a mode, with a fault at a chosen
moment. And it counts what is hard to see: launches, copies, and how often the host waited.

    from drivetrain_conformance import simulated

    simulated.install("sim", simulated.Options(devices=2))
    torch.ones(3, device="sim:1")

Installing compiles it once, which needs a C++ compiler. This module loads no torch.
"""

from __future__ import annotations

from drivetrain_conformance.simulated.building import unavailable
from drivetrain_conformance.simulated.device import (
    COLLECTIVE_BACKEND,
    Counters,
    configure,
    configured,
    counters,
    current_options,
    install,
    installed,
    memory,
)
from drivetrain_conformance.simulated.options import VARIABLE, Options

__all__ = [
    "COLLECTIVE_BACKEND",
    "VARIABLE",
    "Counters",
    "Options",
    "configure",
    "configured",
    "counters",
    "current_options",
    "install",
    "installed",
    "memory",
    "unavailable",
]
