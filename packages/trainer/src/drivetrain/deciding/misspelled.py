"""Names that are wrong on any backend, for when there is none to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces.errors import NotFoundError

from drivetrain.asking import PRECISIONS
from drivetrain.deciding.launcher import NO_LAUNCHER

if TYPE_CHECKING:
    from drivetrain.deciding.draft import Draft


def refuse_misspelled(draft: Draft) -> None:
    """Refuse a precision or launcher that nothing has, so that all mistakes are told at once."""
    precision, launcher = draft.asks.precision, draft.asks.launcher
    if precision and isinstance(precision.value, str) and precision.value not in PRECISIONS:
        draft.refuse(NotFoundError.named("precision", precision.value, sorted(PRECISIONS)))
    known = ("auto", NO_LAUNCHER, *draft.machine.inventory.launchers)
    if launcher and isinstance(launcher.value, str) and launcher.value not in known:
        error = NotFoundError.named("launcher", launcher.value, known)
        hint = draft.hint("launchers", launcher.value) or error.hint
        draft.refuse(NotFoundError(error.message, hint))
