"""What is collected while a plan is made: decisions, problems and notices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drivetrain_interfaces.errors import (
    ConfigurationError,
    DrivetrainError,
)

from drivetrain.names import hint_for
from drivetrain.plan import Candidate, Decision

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from drivetrain.asking import Asks
    from drivetrain.plan import Machine, Request


@dataclass(slots=True)
class Draft:
    """What is collected while deciding."""

    request: Request
    machine: Machine
    asks: Asks
    record: list[Decision] = field(default_factory=list)
    problems: list[tuple[DrivetrainError, tuple[str, ...]]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def decide(
        self,
        what: str,
        chosen: object,
        by: str = "default",
        evidence: Iterable[str] = (),
        candidates: Iterable[Candidate] = (),
    ) -> None:
        """Add a decision to the record."""
        self.record.append(Decision(what, str(chosen), by, tuple(evidence), tuple(candidates)))

    def refuse(self, error: DrivetrainError, *about: str) -> None:
        """Collect a problem and the names of the decisions that it rests on."""
        self.problems.append((error, about))

    def error(self) -> DrivetrainError:
        """All problems as one error."""
        return combined(self.problems, self.record)

    def hint(self, section: str, name: str) -> str:
        """What to do to get a name that nothing here provides; empty if not known."""
        found = hint_for(section, name, dict(self.machine.distributions))
        return found.do if found else ""


def count(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 device`` or ``2 devices``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def processes(number: int) -> str:
    """``1 process`` or ``2 processes``."""
    return "1 process" if number == 1 else f"{number} processes"


def strategy_names(draft: Draft) -> dict[str, str]:
    """Every strategy that can be named, and who brings it."""
    names = {entry.name: entry.owner for entry in draft.machine.inventory.strategies}
    for entry in draft.machine.inventory.backends:
        if entry.spec is not None:
            names |= dict.fromkeys(entry.spec.strategies, entry.owner)
    return names


def combined(
    problems: Sequence[tuple[DrivetrainError, tuple[str, ...]]], record: Sequence[Decision]
) -> DrivetrainError:
    """One error for all problems, which quotes the decisions that they rest on."""
    about = {name for _, names in problems for name in names}
    lines = [f"\n  {one.summary()}" for one in record if one.what in about]
    quoted = f"\nThis rests on:{''.join(lines)}\n" if lines else ""
    first = problems[0][0]
    if len(problems) == 1:
        error = type(first)(first.message, first.hint + quoted)
        error.__cause__ = first.__cause__
        return error
    pairs = [(problem.message, problem.hint) for problem, _ in problems]
    every = ConfigurationError.conflicts(pairs)
    return ConfigurationError(every.message, every.hint + quoted)
