"""The version of the contracts in this package, and the rule for who can serve whom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class ContractVersion:
    """The contract that a package was written for.

    The major number changes when an existing backend could stop working; the minor number when
    something was added that older backends need not know about. Before 1.0 every minor may break.
    """

    major: int
    minor: int

    def serves(self, wanted: ContractVersion) -> bool:
        """Whether this (host) version can run a package written for ``wanted``."""
        if self.major != wanted.major:
            return False
        return self.minor == wanted.minor if self.major == 0 else self.minor >= wanted.minor

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


#: Equal to the major.minor of this distribution; a test keeps them equal.
CONTRACT = ContractVersion(0, 1)
