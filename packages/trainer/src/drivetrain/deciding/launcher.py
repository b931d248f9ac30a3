"""Who starts the processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import (
    ClusterError,
    ConfigurationError,
    NotFoundError,
)

from drivetrain.plan import Candidate

if TYPE_CHECKING:
    from drivetrain_interfaces.backend import BackendSpec

    from drivetrain.deciding.draft import Draft
    from drivetrain.deciding.places import Places


#: The launcher of a run that starts no process, and of one whose processes somebody else started.
NO_LAUNCHER: Final = "none"
ATTACH: Final = "attach"


def choose_launcher(draft: Draft, spec: BackendSpec, places: Places | None) -> str:
    """The name of the launcher."""
    ask, machine = draft.asks.launcher, draft.machine
    world = machine.cluster.world
    if world is not None:
        return _attach(draft)
    if ask is not None and not isinstance(ask.value, str):
        return _own_launcher(draft, ask.value, ask.by)
    if ask is not None:
        return _named_launcher(draft, spec, ask.value, ask.by, places)
    if places is None:
        return NO_LAUNCHER
    if places.world_size == 1:
        draft.decide("launcher", NO_LAUNCHER, "default", ("one process needs no other",))
        return NO_LAUNCHER
    facts = spec.facts
    name = facts.interactive_launcher if machine.interactive else facts.several_devices_launcher
    if name == NO_LAUNCHER and places.local_size > 1:
        name = facts.process_launcher
    where = "at a prompt or in a notebook" if machine.interactive else "for a script"
    candidates = [Candidate(one, "installed") for one in machine.inventory.launchers]
    draft.decide("launcher", name, "default", (f"{spec.name} uses it {where}",), candidates)
    if name not in {*machine.inventory.launchers, NO_LAUNCHER} and not machine.inventory.launchers:
        draft.notices.append(f"No launcher is installed; {name!r} must come from {spec.name!r}.")
    return name


def _attach(draft: Draft) -> str:
    ask, machine = draft.asks.launcher, draft.machine
    evidence = f"{machine.cluster.environment} started the processes"
    if machine.launched_by:
        evidence = f"the launcher {machine.launched_by!r} started this process"
    elif ask is not None and ask.value != ATTACH:
        draft.refuse(
            ClusterError(
                f"{ask.by} starts processes, and {machine.cluster.environment} has started them "
                f"already ({', '.join(machine.cluster.evidence)}).",
                "Leave it out, or set DRIVETRAIN_CLUSTER=none to start them here.",
            ),
            "cluster environment",
        )
    draft.decide("launcher", ATTACH, ask.by if ask else "default", (evidence,))
    return ATTACH


def _own_launcher(draft: Draft, value: Any, by: str) -> str:
    name = getattr(value, "name", None)
    name = name if isinstance(name, str) else type(value).__name__
    if draft.machine.interactive and not value.interactive:
        draft.refuse(
            ConfigurationError(
                f"{by} was asked for, which runs a script again, and there is none at a prompt.",
                "Use a launcher that works interactively, or run a script.",
            )
        )
    draft.decide("launcher", name, by, ("an object was passed",))
    return name


def _named_launcher(
    draft: Draft, spec: BackendSpec, name: str, by: str, places: Places | None
) -> str:
    facts, machine = spec.facts, draft.machine
    known = {
        *machine.inventory.launchers,
        facts.several_devices_launcher,
        facts.interactive_launcher,
        facts.process_launcher or NO_LAUNCHER,
        NO_LAUNCHER,
    }
    draft.decide(
        "launcher",
        name,
        by,
        (),
        [Candidate(one, "installed") for one in machine.inventory.launchers],
    )
    if name not in known:
        error = NotFoundError.named("launcher", name, ("auto", *sorted(known)))
        draft.refuse(NotFoundError(error.message, draft.hint("launchers", name) or error.hint))
    elif name == ATTACH:
        draft.refuse(
            ClusterError(
                f"{by} joins processes that somebody else has started, and nothing shows that "
                "there are any.",
                "Start the program with torchrun or a cluster manager, or leave launcher out.",
            ),
            "cluster environment",
        )
    elif name == NO_LAUNCHER and places is not None and places.world_size > 1:
        draft.refuse(
            ConfigurationError(
                f"{by} starts no process, and the run has {places.world_size}.",
                "Use devices=1, or leave launcher out.",
            ),
            "processes",
        )
    elif (
        machine.interactive
        and name == facts.several_devices_launcher
        and name != facts.interactive_launcher
    ):
        draft.refuse(
            ConfigurationError(
                f"{by} was asked for, and it needs a script, which a prompt or notebook lacks.",
                f"Use launcher={facts.interactive_launcher!r}, or run a script.",
            )
        )
    return name
