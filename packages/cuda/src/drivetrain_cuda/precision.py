"""Which numeric formats a CUDA device has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.float8 import Float8Precision
from drivetrain_toolkit.precision import make_precision

from drivetrain_cuda import CAPABILITIES, FACTS

if TYPE_CHECKING:
    from drivetrain_interfaces import Precision

#: The first compute capability with matrix products in float8.
HAS_FLOAT8 = (8, 9)


def precision(name: str) -> Precision:
    """The precision of that name. Raises ``UnsupportedError`` for one that is not declared."""
    declared = CAPABILITIES.precisions
    if name not in declared:
        raise UnsupportedError(
            f"The 'cuda' backend was asked for precision {name!r}, which it does not declare.",
            f"Use one of: {listed(declared)}.",
        )
    if name == "fp8":
        return Float8Precision(FACTS.autocast_type, problem=float8_problem)
    return make_precision(name, FACTS.autocast_type)


def float8_problem() -> str:
    """Why the current device has no float8; empty if it has."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return too_old(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def too_old(name: str, capability: tuple[int, int]) -> str:
    """Why a device of that capability has no float8; empty if it has."""
    if capability >= HAS_FLOAT8:
        return ""
    major, minor = capability
    return f"{name} has compute capability {major}.{minor}, while float8 came with 8.9"
