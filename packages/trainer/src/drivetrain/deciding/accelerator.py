"""Which backend runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.backend import BackendSpec
from drivetrain_interfaces.errors import (
    ConfigurationError,
    NotFoundError,
    UnavailableError,
    listed,
)

from drivetrain.asking import is_accelerator_object, no_gpus
from drivetrain.deciding.draft import count, strategy_names
from drivetrain.plan import Candidate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.discovery import BackendEntry

    from drivetrain.deciding.draft import Draft


def note_cluster(draft: Draft) -> World | None:
    """Put what was found out about the cluster into the record."""
    finding = draft.machine.cluster
    evidence = list(finding.evidence)
    if finding.world is not None:
        world = finding.world
        evidence.append(f"rank {world.rank} of {world.size}, {world.local_size} on this machine")
    if finding.machines is not None:
        told = finding.machines
        evidence.append(f"machine {told.node_rank} of {told.num_nodes}, ranks are started here")
    draft.notices += finding.remarks
    draft.decide(
        "cluster environment", finding.environment, finding.asked_by, evidence, finding.candidates
    )
    if finding.problem is not None:
        draft.refuse(finding.problem, "cluster environment")
    return finding.world


def choose_accelerator(draft: Draft) -> BackendEntry | None:
    """The backend that runs it, with spec and probe; None if there is none."""
    wanted = draft.request.accelerator
    if is_accelerator_object(wanted):
        return _accelerator_of_object(draft, wanted)
    if isinstance(wanted, BackendSpec):
        return _named_accelerator(draft, wanted.name)
    if not isinstance(wanted, str):
        draft.refuse(
            ConfigurationError(
                f"accelerator={wanted!r} is a {type(wanted).__name__}, which is no name, no "
                "backend spec and no accelerator object.",
                "Give a name such as 'auto', or an object with the members of Accelerator.",
            )
        )
        return None
    if wanted == "auto":
        return _best_accelerator(draft)
    return _named_accelerator(draft, wanted)


def _verdict(entry: BackendEntry) -> str:
    if entry.problem is not None:
        return f"skipped: {entry.problem}"
    if entry.spec is None or entry.probe is None:
        return "not looked at"
    if entry.probe.devices < 1:
        return f"unavailable: {entry.probe.reason or 'no devices'}"
    return f"available, priority {entry.spec.priority}, {count(entry.probe.devices, 'device')}"


def _usable(entry: BackendEntry) -> bool:
    found = entry.spec is not None and entry.probe is not None and entry.probe.devices > 0
    return found and entry.problem is None


def _chosen(draft: Draft, entry: BackendEntry, by: str, why: Sequence[str] = ()) -> BackendEntry:
    candidates = [Candidate(one.name, _verdict(one)) for one in draft.machine.inventory.backends]
    names = entry.probe.names if entry.probe else ()
    evidence = [*why, f"brought by {entry.owner}"]
    if names:
        evidence.append(f"devices {', '.join(names)}")
    draft.decide("accelerator", entry.name, by, evidence, candidates)
    return entry


def _best_accelerator(draft: Draft) -> BackendEntry | None:
    entries = draft.machine.inventory.backends
    by, fitting = "default", [entry for entry in entries if _usable(entry)]
    if draft.request.gpus is not None:
        by, host = f"gpus={draft.request.gpus!r}", no_gpus(draft.request)
        fitting = [entry for entry in fitting if entry.spec and entry.spec.facts.indexed != host]
    if fitting:
        best = max(fitting, key=lambda one: one.spec.priority if one.spec else 0)
        return _chosen(draft, best, by, ("available, with the highest priority",))
    draft.decide(
        "accelerator",
        "undecided",
        by,
        candidates=[Candidate(entry.name, _verdict(entry)) for entry in entries],
    )
    if not entries:
        draft.refuse(
            NotFoundError(
                "No backend is installed, and a run needs one.",
                "Install the one for your hardware, such as drivetrain-cpu.",
            )
        )
        return None
    what = "accelerator='auto'" if by == "default" else by
    draft.refuse(
        UnavailableError(
            f"{what} was asked for, and no fitting backend can run on this machine (installed: "
            f"{listed(entry.name for entry in entries)}).",
            "Install the backend of your hardware; 'drivetrain doctor' says which it sees.",
        ),
        "accelerator",
    )
    return None


def _named_accelerator(draft: Draft, name: str) -> BackendEntry | None:
    entries = draft.machine.inventory.backends
    by = f"accelerator={name!r}"
    entry = next((one for one in entries if one.name == name), None)
    if entry is None:
        draft.refuse(_unknown_accelerator(draft, name))
        return None
    _chosen(draft, entry, by)
    if entry.problem is not None:
        draft.refuse(entry.problem, "accelerator")
        return None
    if not _usable(entry):
        reason = entry.probe.reason if entry.probe else ""
        draft.refuse(
            UnavailableError(
                f"{by} was asked for, and {entry.owner} found no device on this machine: "
                f"{(reason or 'it gives no reason').rstrip('.')}.",
                "Mend that, or use accelerator='auto'.",
            ),
            "accelerator",
        )
        return None
    return _checked_against_gpus(draft, entry, by)


def _checked_against_gpus(draft: Draft, entry: BackendEntry, by: str) -> BackendEntry:
    gpus = draft.request.gpus
    if gpus is None or entry.spec is None:
        return entry
    if entry.spec.facts.indexed == no_gpus(draft.request):
        draft.refuse(
            ConfigurationError(
                f"{by} and gpus={gpus!r} were asked for, and they exclude each other.",
                "Leave gpus out, and use devices= to say how many.",
            )
        )
    return entry


def _unknown_accelerator(draft: Draft, name: str) -> NotFoundError:
    known = tuple(one.name for one in draft.machine.inventory.backends)
    error = NotFoundError.named("accelerator", name, ("auto", *known))
    is_strategy_name = name in strategy_names(draft) or draft.hint("strategies", name)
    hint = draft.hint("accelerators", name)
    if not hint and is_strategy_name:
        hint = f"Use strategy={name!r}; accelerator= names the hardware."
    return NotFoundError(error.message, hint or error.hint)


def _accelerator_of_object(draft: Draft, wanted: Any) -> BackendEntry | None:
    device_type = wanted.facts.device_type
    by = f"accelerator={type(wanted).__name__}(...)"
    entries = [
        entry
        for entry in draft.machine.inventory.backends
        if entry.spec is not None and entry.spec.facts.device_type == device_type
    ]
    if not entries:
        known = draft.machine.inventory.backends
        types = listed({entry.spec.facts.device_type for entry in known if entry.spec})
        draft.refuse(
            NotFoundError(
                f"{by} is for {device_type!r} devices, and no installed backend is (device types "
                f"of those that work: {types}).",
                draft.hint("accelerators", device_type) or "Install the backend it belongs to.",
            )
        )
        return None
    fitting = [entry for entry in entries if _usable(entry)] or entries
    best = max(fitting, key=lambda one: one.spec.priority if one.spec else 0)
    _chosen(draft, best, by, (f"the object is for {device_type!r} devices",))
    if not _usable(best):
        reason = best.problem or (best.probe.reason if best.probe else "")
        draft.refuse(
            UnavailableError(
                f"{by} was asked for, and {best.owner} found no device on this machine: {reason}.",
                "Mend that, or use accelerator='auto'.",
            ),
            "accelerator",
        )
        return None
    return _checked_against_gpus(draft, best, by)
