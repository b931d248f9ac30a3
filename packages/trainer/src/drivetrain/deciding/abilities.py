"""Whether the chosen parts can do what other settings need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces.capabilities import Feature
from drivetrain_interfaces.errors import (
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from drivetrain_interfaces.capabilities import Capabilities

    from drivetrain.deciding.draft import Draft
    from drivetrain.deciding.places import Places
    from drivetrain.plan import Plan, Want


def check_abilities(draft: Draft, capabilities: Capabilities, places: Places | None) -> None:
    """Refuse what the run needs and the chosen parts do not declare."""
    about = ("accelerator", "strategy")
    several = places is not None and places.world_size > 1
    if several and Feature.SEVERAL_PROCESSES not in capabilities:
        world_size = places.world_size if places else 1
        draft.refuse(
            UnsupportedError(
                f"The run has {world_size} processes, and the chosen parts cannot train one model "
                "in more than one.",
                "Use devices=1, or another accelerator or strategy.",
            ),
            *about,
            "processes",
        )
    if draft.request.sync_batchnorm and not several:
        draft.notices.append("sync_batchnorm=True has no effect with one process.")
    elif draft.request.sync_batchnorm and Feature.SYNC_BATCHNORM not in capabilities:
        draft.refuse(
            UnsupportedError(
                "sync_batchnorm=True was asked for, and the chosen parts cannot take batch "
                "statistics over all processes.",
                "Leave it out, or use another accelerator or strategy.",
            ),
            *about,
        )
    for error in unmet(capabilities, draft, draft.request.wants):
        draft.refuse(error, *about)


def unmet(
    capabilities: Capabilities, where: Draft | Plan, wants: Iterable[Want]
) -> Iterable[UnsupportedError]:
    """An error for each want that ``capabilities`` lacks; the record names the parts."""
    chosen = {one.what: one.chosen for one in where.record}
    parts = f"{chosen.get('strategy', 'this strategy')!r} on {chosen.get('accelerator', '')!r}"
    for want in wants:
        feature = isinstance(want.what, Feature)
        if want.what in (capabilities.features if feature else capabilities.hooks):
            continue
        if feature:
            message = f"{want.asked_by} needs {want.what.value!r}, which {parts} cannot do."
        else:
            message = (
                f"{want.asked_by} is called at the moment {want.what.value!r} of a step, and "
                f"{parts} cannot call user code there."
            )
        yield UnsupportedError(message, "Leave it out, or use another accelerator or strategy.")
