"""Looking at the machine before a plan is made: what is installed, and who started this process.

This is the impure half of resolving. It raises nothing that a plan could report together with other
problems: what it finds wrong is kept as an error inside the returned ``Machine``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from drivetrain_interfaces.backend import BackendSpec
from drivetrain_interfaces.cluster import (
    ClusterEnvironment,
    DescribesMachines,
    Remarks,
    priority_of,
)
from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.discovery import (
    ENVIRONMENTS,
    BackendEntry,
    Inventory,
    check,
    probed,
    registrations,
    single,
    take_inventory,
)
from drivetrain_interfaces.errors import (
    ClusterError,
    ContractMismatchError,
    DrivetrainError,
    NotFoundError,
)

from drivetrain.asking import sort_out
from drivetrain.names import hint_for, installed_distributions
from drivetrain.plan import Candidate, ClusterFinding, Machine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces.discovery import Registration

    from drivetrain.plan import Request

CLUSTER_SWITCH = "DRIVETRAIN_CLUSTER"
LAUNCHED = "DRIVETRAIN_LAUNCHED"
GIVEN = "the program itself"


def survey(request: Request, environ: Mapping[str, str] | None = None) -> Machine:
    """Everything that a plan may rest on, looked up once.

    Imports only what the request names: with ``accelerator="cpu"`` the other backends are listed
    and not imported.

    Args:
        request: What the user asked for.
        environ: The variables of this process; None means ``os.environ``.
    """
    environ = os.environ if environ is None else environ
    claims = registrations(ENVIRONMENTS)
    inventory = _inventory(request)
    # An environment that the user passes as an object knows better than any that is installed.
    asked = sort_out(request).environment
    cluster = find_cluster(environ, claims, "auto" if asked is None else asked.value)
    told = cluster.machines
    return Machine(
        inventory=inventory,
        cluster=cluster,
        interactive=is_interactive(),
        launched_by=environ.get(LAUNCHED, ""),
        node_rank=told.node_rank if told else _number(environ, "NODE_RANK", "GROUP_RANK"),
        address=told.address if told else environ.get("MASTER_ADDR", ""),
        port=told.port if told else _number(environ, "MASTER_PORT") or 0,
        distributions=installed_distributions(),
    )


def is_interactive() -> bool:
    """Whether a person is typing: there is no script that another process could run again."""
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return True
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell, "get_ipython", lambda: None)() is not None


def _inventory(request: Request) -> Inventory:
    wanted = request.accelerator
    if isinstance(wanted, BackendSpec):
        rest = take_inventory(wanted.name)
        given = _given_entry(wanted)
        others = tuple(entry for entry in rest.backends if entry.name != wanted.name)
        return replace(rest, backends=(*others, given))
    if isinstance(wanted, str) and wanted != "auto":
        return take_inventory(wanted)
    return take_inventory()


def _given_entry(spec: BackendSpec) -> BackendEntry:
    if not CONTRACT.serves(spec.contract):
        mismatch = ContractMismatchError.between(spec.name, spec.contract, CONTRACT)
        return BackendEntry(spec.name, GIVEN, problem=mismatch)
    probe, broken = probed(spec, GIVEN)
    return BackendEntry(spec.name, GIVEN, spec=spec, probe=probe, problem=broken)


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one environment said about this process."""

    environment: ClusterEnvironment | None
    candidate: Candidate
    evidence: tuple[str, ...] = ()


def find_cluster(
    environ: Mapping[str, str],
    claims: Mapping[str, tuple[Registration, ...]],
    asked: str | ClusterEnvironment = "auto",
) -> ClusterFinding:
    """Who started this process, and its place among the others.

    The first environment with evidence is used, in the order of their priorities: torchrun before
    the others, since it runs inside them, and ``"local"`` last.

    Args:
        environ: The variables of this process.
        claims: The installed environments by name.
        asked: A name, ``"none"``, ``"auto"``, or the user's own environment.
    """
    switch = environ.get(CLUSTER_SWITCH, "")
    if environ.get(LAUNCHED) and isinstance(asked, str):
        # Our own launcher has started this process: the choice was made in its parent, and what
        # a manager of the parent has left in the variables does not count any more.
        by = f"{LAUNCHED}={environ[LAUNCHED]}"
        return _use_named("local", claims, environ, by, sure=(by,))
    if not isinstance(asked, str):
        return _use_own(asked, switch, environ)
    if switch and asked not in ("auto", switch):
        return ClusterFinding(
            problem=ClusterError(
                f"cluster_environment={asked!r} was asked for, and the variable {CLUSTER_SWITCH} "
                f"is {switch!r}.",
                f"Change one of them, or unset {CLUSTER_SWITCH}.",
            )
        )
    name = switch or asked
    by = f"{CLUSTER_SWITCH}={switch}" if switch else f"cluster_environment={asked!r}"
    if name == "none":
        return ClusterFinding(
            evidence=("detection is switched off",), asked_by=by, environment="local"
        )
    if name != "auto":
        return _use_named(name, claims, environ, by)
    return _first_with_evidence(claims, environ)


def _use_own(own: ClusterEnvironment, switch: str, environ: Mapping[str, str]) -> ClusterFinding:
    by = f"cluster_environment={type(own).__name__}(...)"
    if switch and switch != own.name:
        return ClusterFinding(
            problem=ClusterError(
                f"{by} was asked for, and the variable {CLUSTER_SWITCH} is {switch!r}.",
                f"Unset {CLUSTER_SWITCH}, or pass no environment.",
            )
        )
    evidence = own.detect(environ)
    described = _described(own, environ, Candidate(own.name, "asked for"), by)
    if described is not None:
        return described
    seen = Candidate(own.name, "asked for" if evidence else "asked for, sees no other processes")
    return _place(_Answer(own, seen, tuple(evidence)), (seen,), environ, by)


def _use_named(
    name: str,
    claims: Mapping[str, tuple[Registration, ...]],
    environ: Mapping[str, str],
    by: str,
    sure: tuple[str, ...] = (),
) -> ClusterFinding:
    if name not in claims:
        hint = hint_for("environments", name, dict(installed_distributions()))
        missing = NotFoundError.named("cluster environment", name, ("none", *claims))
        if hint and hint.do:
            missing = NotFoundError(missing.message, hint.do)
        return ClusterFinding(problem=missing, asked_by=by)
    try:
        environment = check(
            single(ENVIRONMENTS, name, claims[name]),
            ClusterEnvironment,  # type: ignore[type-abstract]  # a protocol that isinstance knows
            "cluster environment",
        )
    except DrivetrainError as problem:
        return ClusterFinding(environment=name, problem=problem, asked_by=by)
    evidence = tuple(environment.detect(environ)) or sure
    seen = Candidate(name, "asked for")
    described = _described(environment, environ, seen, by)
    if described is not None:
        return described
    if not evidence and name != "local":
        return ClusterFinding(
            environment=name,
            candidates=(Candidate(name, "no evidence"),),
            problem=ClusterError(
                f"{by} was asked for, and nothing shows that {name!r} started this process.",
                f"Start the program under {name}, or ask for another environment.",
            ),
            asked_by=by,
        )
    return _place(_Answer(environment, seen, evidence), (seen,), environ, by)


def _first_with_evidence(
    claims: Mapping[str, tuple[Registration, ...]], environ: Mapping[str, str]
) -> ClusterFinding:
    answers = [_ask(name, claims[name], environ) for name in claims]
    answers.sort(key=lambda one: (-priority_of(one.environment), one.candidate.name))
    chosen = next((answer for answer in answers if answer.evidence), None)
    candidates = tuple(
        Candidate(answer.candidate.name, f"{answer.candidate.verdict}, but comes later")
        if answer.evidence and answer is not chosen
        else answer.candidate
        for answer in answers
    )
    if chosen is not None:
        return _place(chosen, candidates, environ, "default")
    for answer in answers:
        described = _described(answer.environment, environ, answer.candidate, "default")
        if described is not None:
            return replace(described, candidates=candidates)
    return ClusterFinding(
        evidence=("no environment has evidence of other processes",),
        candidates=candidates,
        remarks=tuple(
            remark for answer in answers for remark in _remarks(answer.environment, environ)
        ),
    )


def _described(
    environment: ClusterEnvironment | None,
    environ: Mapping[str, str],
    seen: Candidate,
    by: str,
) -> ClusterFinding | None:
    """The finding for a manager that describes machines, and made this process no rank."""
    if not isinstance(environment, DescribesMachines):
        return None
    name = seen.name
    try:
        machines = environment.machines(environ)
    except DrivetrainError as problem:
        return ClusterFinding(environment=name, candidates=(seen,), problem=problem, asked_by=by)
    if machines is None:
        return None
    return ClusterFinding(
        environment=name,
        evidence=machines.evidence,
        candidates=(seen,),
        asked_by=by,
        machines=machines,
        remarks=_remarks(environment, environ),
    )


def _remarks(environment: ClusterEnvironment | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(environment.remarks(environ)) if isinstance(environment, Remarks) else ()


def _ask(name: str, claims: tuple[Registration, ...], environ: Mapping[str, str]) -> _Answer:
    try:
        environment = check(
            single(ENVIRONMENTS, name, claims),
            ClusterEnvironment,  # type: ignore[type-abstract]  # a protocol that isinstance knows
            "cluster environment",
        )
    except DrivetrainError as problem:
        return _Answer(None, Candidate(name, f"skipped: {problem}"))
    try:
        evidence = tuple(environment.detect(environ))
    except Exception as error:  # noqa: BLE001 - a broken package is one line of the record
        owner = claims[0].owner
        return _Answer(
            None, Candidate(name, f"skipped: {owner} raised {type(error).__name__}: {error}")
        )
    verdict = f"evidence {', '.join(evidence)}" if evidence else "no evidence"
    return _Answer(environment, Candidate(name, verdict), evidence)


def _place(
    answer: _Answer, candidates: tuple[Candidate, ...], environ: Mapping[str, str], by: str
) -> ClusterFinding:
    """The finding for the environment that is used: its world, or why it cannot be read."""
    environment = answer.environment
    name = answer.candidate.name
    if environment is None or not answer.evidence:
        return ClusterFinding(
            environment=name,
            evidence=("no evidence of other processes",),
            candidates=candidates,
            asked_by=by,
        )
    finding = ClusterFinding(
        environment=name,
        evidence=answer.evidence,
        candidates=candidates,
        asked_by=by,
        remarks=_remarks(environment, environ),
    )
    try:
        return replace(finding, world=environment.world(environ))
    except DrivetrainError as problem:
        return replace(finding, problem=problem)
    except ValueError as error:
        broken = ClusterError(
            f"The environment {name!r} was found by {', '.join(answer.evidence)}, and its "
            f"variables make no world: {error}.",
            f"Correct them, or set {CLUSTER_SWITCH}=none to ignore them.",
        )
        broken.__cause__ = error
        return replace(finding, problem=broken)
