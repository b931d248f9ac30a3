"""How far a result may be from the float64 reference, by what the numbers are stored and made in.

The factors over the format's own precision leave room for the order of additions and for matrix
units that round more coarsely inside; they are far below what a wrong factor or a lost gradient
does, which is 25 % and more in these tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain_interfaces import PrecisionPolicy


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest relative errors.

    Attributes:
        loss: Of a loss, or of a norm.
        update: Of the way that parameters went, as a norm over all of them.
    """

    loss: float
    update: float


#: By the dtype of matrix products, with parameters in float32 or better.
COMPUTED = {
    "float64": Tolerance(1e-12, 1e-11),
    "float32": Tolerance(1e-5, 1e-4),
    "float16": Tolerance(5e-3, 1e-2),
    "bfloat16": Tolerance(3e-2, 6e-2),
}
#: By the dtype of parameters, where that is coarser than float32: each update is rounded as well.
STORED = {
    "float16": Tolerance(1e-2, 2e-2),
    "bfloat16": Tolerance(5e-2, 1.5e-1),
}
#: For a format that this table does not know, such as one of eight bits.
UNKNOWN = Tolerance(1e-1, 2e-1)


def tolerance(policy: PrecisionPolicy) -> Tolerance:
    """The tolerance for a precision with this policy: the widest that applies."""
    computed = COMPUTED.get(policy.compute, UNKNOWN)
    if policy.parameters in {"float32", "float64"}:
        # What is stored in float32 is not better than float32, whatever it is computed in.
        stored = COMPUTED[policy.parameters]
    else:
        stored = STORED.get(policy.parameters, UNKNOWN)
    return Tolerance(max(computed.loss, stored.loss), max(computed.update, stored.update))


#: How far a loss curve may be from the recorded one, as a share of its first loss: some ten times
#: what these formats do on the host. Matrix units that round float32 to ten bits stay within it.
CURVES = {"float64": 1e-9, "float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}


def curve_tolerance(policy: PrecisionPolicy) -> float:
    """The tolerance of a loss curve for a precision with this policy."""
    return max(CURVES.get(policy.compute, 0.1), CURVES.get(policy.parameters, 0.1))
