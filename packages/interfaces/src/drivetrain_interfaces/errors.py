"""Every error raised on purpose: what was asked and found, what to do, and a code.

All of them pickle, since they cross process boundaries; variants are class methods rather than
constructors, so that ``args`` is always ``(message, hint)``.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

    from drivetrain_interfaces.contract import ContractVersion


def listed(names: Iterable[object]) -> str:
    """Names in a fixed order for a message; ``none`` when there are none."""
    return ", ".join(sorted(str(name) for name in names)) or "none"


class DrivetrainError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What was asked for, and what was found instead.
        hint: What the reader does next, as an instruction.
    """

    code: ClassVar[str] = "DT000"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint
        self._problems: tuple[tuple[str, str], ...] = ()

    @property
    def problems(self) -> tuple[tuple[str, str], ...]:
        """Every ``(what is wrong, what to do)`` in it: one, unless it lists several conflicts."""
        return self._problems or ((self.message, self.hint),)

    def __str__(self) -> str:
        return " ".join(part for part in (self.message, self.hint, f"[{self.code}]") if part)


class NotFoundError(DrivetrainError, LookupError):
    """A name that no installed package provides."""

    code = "DT101"

    @classmethod
    def named(cls, kind: str, name: str, known: Sequence[str], package: str | None = None) -> Self:
        """The error for ``name``, with the nearest known name or the package to install."""
        near = difflib.get_close_matches(name, known, n=1)
        if package:
            hint = f"Install {package}."
        elif near:
            hint = f"Use {near[0]!r}, the nearest name."
        else:
            hint = "Use one of the installed names, or install the package that provides it."
        return cls(
            f"No installed package provides the {kind} {name!r} (installed: {listed(known)}).", hint
        )


class UnavailableError(DrivetrainError, RuntimeError):
    """A backend is installed, but this machine cannot run it."""

    code = "DT102"


class ContractMismatchError(DrivetrainError, ImportError):
    """A package was written for a contract that this installation does not serve."""

    code = "DT103"

    @classmethod
    def between(cls, owner: str, wanted: ContractVersion, served: ContractVersion) -> Self:
        """The error for ``owner`` (distribution and version), which wants another contract."""
        return cls(
            f"{owner} was written for contract {wanted}; "
            f"drivetrain-interfaces here serves {served}.",
            "Upgrade drivetrain-interfaces."
            if wanted > served
            else f"Upgrade {owner.split(maxsplit=1)[0]}.",
        )


class BrokenPackageError(DrivetrainError, ImportError):
    """An installed package could not be used: its import failed or it registers something else."""

    code = "DT104"


class UnsupportedError(DrivetrainError, ValueError):
    """Something that a backend, strategy or step declares it cannot do was asked of it."""

    code = "DT105"


class ConfigurationError(DrivetrainError, ValueError):
    """Arguments that cannot be met, or that contradict each other; lists all conflicts at once."""

    code = "DT201"

    @classmethod
    def conflicts(cls, problems: Sequence[tuple[str, str]]) -> Self:
        """One error for all ``(what is wrong, what to do)`` pairs."""
        if len(problems) == 1:
            return cls(*problems[0])
        lines = "".join(f"\n  {n}. {what} {do}" for n, (what, do) in enumerate(problems, 1))
        error = cls(f"{len(problems)} settings cannot be met:{lines}\n", "Change all of them.")
        error._problems = tuple(problems)
        return error


class ClusterError(DrivetrainError, ValueError):
    """The cluster's variables contradict each other or the Trainer's arguments."""

    code = "DT202"


class DataError(DrivetrainError, ValueError):
    """A loader or batch that cannot be trained on."""

    code = "DT203"


class UserCodeError(DrivetrainError, ValueError):
    """A user's step or hook returned what the loop cannot use."""

    code = "DT204"


class NonFiniteLossError(DrivetrainError, ArithmeticError):
    """The loss became NaN or infinite."""

    code = "DT301"


class ProcessFailedError(DrivetrainError, RuntimeError):
    """Another process of the run failed; the message carries the first failure."""

    code = "DT302"


class CheckpointError(DrivetrainError, ValueError):
    """A checkpoint that is missing, incomplete, corrupt, foreign, or cannot be encoded."""

    code = "DT401"


class StorageError(DrivetrainError, OSError):
    """A directory or file that cannot be written or read."""

    code = "DT402"

    def __str__(self) -> str:  # OSError would format two arguments as [Errno]
        return DrivetrainError.__str__(self)
