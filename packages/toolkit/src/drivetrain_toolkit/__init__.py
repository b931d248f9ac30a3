"""Torch parts that backends are assembled from.

Importing this package, or ``drivetrain_toolkit.specs``, loads no torch, so that a backend's spec
may use what they declare. Each part lives in a module of its own; import from there::

    from drivetrain_toolkit.strategies import DDPStrategy
"""

from __future__ import annotations

from drivetrain_interfaces.contract import ContractVersion

#: The contract that the strategies of this package were written for.
CONTRACT = ContractVersion(0, 1)
