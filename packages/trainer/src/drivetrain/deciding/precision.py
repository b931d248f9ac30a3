"""Which numeric format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from drivetrain_interfaces.errors import (
    NotFoundError,
    UnsupportedError,
    listed,
)

from drivetrain.asking import PRECISIONS
from drivetrain.plan import Candidate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_interfaces.backend import BackendSpec
    from drivetrain_interfaces.capabilities import Capabilities

    from drivetrain.deciding.draft import Draft


#: What the default precision falls back to on a backend without the first of them.
_PRECISION_ORDER: Final = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


def choose_precision(draft: Draft, spec: BackendSpec, capabilities: Capabilities) -> str:
    """The name of the precision."""
    made = capabilities.precisions
    candidates = [Candidate(name, "can be made") for name in sorted(made)]
    ask = draft.asks.precision
    if ask is None:
        return _default_precision(draft, spec, made, candidates)
    if not isinstance(ask.value, str):
        name = str(ask.value.name)
        draft.decide("precision", name, ask.by, ("an object was passed",))
        return name
    if ask.value in made:
        draft.decide("precision", ask.value, ask.by, ("it can be made",), candidates)
        return ask.value
    known = PRECISIONS.union(
        *(one.spec.capabilities.precisions for one in draft.machine.inventory.backends if one.spec)
    )
    meaning = "" if ask.by.endswith(f"={ask.value!r}") else f", which means {ask.value!r},"
    if ask.value in known:
        draft.refuse(
            UnsupportedError(
                f"{ask.by}{meaning} was asked for, and {spec.name!r} with this strategy makes "
                f"{listed(made)}.",
                "Use one of these, or another accelerator or strategy.",
            ),
            "accelerator",
            "strategy",
        )
    else:
        draft.refuse(NotFoundError.named("precision", ask.value, sorted(made)), "accelerator")
    return ask.value


def _default_precision(
    draft: Draft, spec: BackendSpec, made: frozenset[str], candidates: Sequence[Candidate]
) -> str:
    first = _PRECISION_ORDER[0]
    order: list[str] = [name for name in _PRECISION_ORDER if name in made] or sorted(made)
    if not order:
        draft.refuse(
            UnsupportedError(
                f"{spec.name!r} with this strategy declares no precision that it can make.",
                "Use another strategy, or pass a precision object.",
            ),
            "accelerator",
            "strategy",
        )
        return first
    if order[0] != first:
        draft.notices.append(
            f"{spec.name!r} does not make {first!r}; the precision is {order[0]!r}. "
            "Set precision= to choose."
        )
    draft.decide("precision", order[0], "default", (), candidates)
    return order[0]
