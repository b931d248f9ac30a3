"""What is installed, what the machine has, and what to install: for people, and as JSON.

Loads no torch: versions come from package metadata, and probes open no device.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.discovery import (
    ENVIRONMENTS,
    LAUNCHERS,
    registrations,
)
from drivetrain_interfaces.errors import DrivetrainError

from drivetrain.names import installed_distributions, table, version_of
from drivetrain.plan import Candidate, Request
from drivetrain.resolve import resolve
from drivetrain.survey import survey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain.plan import ClusterFinding, Machine


@dataclass(frozen=True, slots=True)
class Installed:
    """One name that an installed package provides.

    Attributes:
        kind: ``"backend"``, ``"strategy"``, ``"launcher"`` or ``"environment"``.
        name: What users ask for.
        owner: Distribution and version.
        devices: For a backend that could be probed, how many devices it found.
        finding: What the probe found, in words; empty for other kinds.
        problem: Why it cannot be used, in one line; empty when it can.
    """

    kind: str
    name: str
    owner: str
    devices: int | None = None
    finding: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Hardware that the operating system shows, and the package that serves it."""

    name: str
    sign: str
    distribution: str
    installed: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that ``drivetrain doctor`` prints.

    Attributes:
        python: Version of the interpreter.
        platform: Operating system and machine.
        torch: Version of torch, or empty.
        contract: The contract that is served here.
        distributions: Drivetrain packages, as (name, version).
        installed: What they provide.
        hardware: What the operating system shows.
        cluster: Name of the cluster environment, with its evidence.
        cluster_candidates: What each environment answered.
        cluster_problem: Why the cluster's variables cannot be read; empty when they can.
        auto: What ``accelerator="auto"`` chooses, in one line; empty when nothing can run.
        auto_problem: Why nothing can run; empty when something can.
        todo: What to install or mend, as instructions.
    """

    python: str
    platform: str
    torch: str
    contract: str
    distributions: tuple[tuple[str, str], ...]
    installed: tuple[Installed, ...]
    hardware: tuple[Hardware, ...]
    cluster: str
    cluster_candidates: tuple[Candidate, ...]
    cluster_problem: str
    auto: str
    auto_problem: str
    todo: tuple[str, ...]

    def render(self) -> str:
        """The report as text."""
        lines = [
            f"python {self.python} on {self.platform}",
            f"torch {self.torch or 'is not installed'}",
            f"contract {self.contract}",
            *(f"{name} {version}" for name, version in self.distributions),
        ]
        for kind, title in _TITLES.items():
            lines += ["", f"{title}:"]
            lines += [_line(one) for one in self.installed if one.kind == kind] or ["  none"]
        lines += ["", "hardware that the system shows:"]
        lines += [
            f"  {one.name} ({one.sign}): served by {one.distribution}, "
            f"{'installed' if one.installed else 'not installed'}"
            for one in self.hardware
        ] or ["  nothing besides the host"]
        lines += ["", f"cluster: {self.cluster}"]
        lines += [f"  {one.name}: {one.verdict}" for one in self.cluster_candidates]
        lines += [f"  problem: {self.cluster_problem}"] if self.cluster_problem else []
        lines += ["", f"accelerator='auto' chooses: {self.auto or 'nothing'}"]
        lines += [f"  {self.auto_problem}"] if self.auto_problem else []
        lines += ["", "to do:", *(f"  - {todo}" for todo in self.todo)] if self.todo else []
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=2)


_TITLES = {
    "backend": "backends",
    "strategy": "strategies of packages of their own",
    "launcher": "launchers",
    "environment": "cluster environments",
}


def examine(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> Report:
    """Look at everything; raises nothing for what is broken.

    Args:
        environ: The variables of this process; None means ``os.environ``.
        root: Where the file system starts in which signs of hardware are looked for.
    """
    request = Request()
    machine = survey(request, os.environ if environ is None else environ)
    auto, auto_problem = _auto(request, machine)
    installed = (*_backends(machine), *_others(machine))
    distributions = _distributions()
    hardware = _hardware(root, {name for name, _ in distributions})
    return Report(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        torch=version_of("torch"),
        contract=str(CONTRACT),
        distributions=distributions,
        installed=installed,
        hardware=hardware,
        cluster=_cluster(machine.cluster),
        cluster_candidates=machine.cluster.candidates,
        cluster_problem=str(machine.cluster.problem or ""),
        auto=auto,
        auto_problem=auto_problem,
        todo=_todo(machine, hardware, installed),
    )


def _distributions() -> tuple[tuple[str, str], ...]:
    known = dict(installed_distributions())
    for name in ("drivetrain", "drivetrain-interfaces"):
        if version := version_of(name):
            known[name] = version
    return tuple(sorted(known.items()))


def _backends(machine: Machine) -> tuple[Installed, ...]:
    found = []
    for entry in machine.inventory.backends:
        problem = _one_line(str(entry.problem or ""))
        if entry.probe is None:
            found.append(Installed("backend", entry.name, entry.owner, problem=problem))
            continue
        names = f" ({', '.join(entry.probe.names)})" if entry.probe.names else ""
        devices = entry.probe.devices
        finding = f"{devices} device{'' if devices == 1 else 's'}{names}"
        if devices < 1:
            problem = _one_line(entry.probe.reason) or "no devices, and no reason given"
        found.append(Installed("backend", entry.name, entry.owner, devices, finding, problem))
    return tuple(found)


def _others(machine: Machine) -> tuple[Installed, ...]:
    strategies = [
        Installed("strategy", one.name, one.owner, problem=_one_line(str(one.problem or "")))
        for one in machine.inventory.strategies
    ]
    named = [
        Installed(kind, name, " and ".join(claim.owner for claim in claims))
        for kind, group in (("launcher", LAUNCHERS), ("environment", ENVIRONMENTS))
        for name, claims in registrations(group).items()
    ]
    skipped = {
        one.name: one.verdict.removeprefix("skipped: ")
        for one in machine.cluster.candidates
        if one.verdict.startswith("skipped: ")
    }
    return (
        *strategies,
        *(
            Installed(one.kind, one.name, one.owner, problem=_one_line(skipped.get(one.name, "")))
            if one.kind == "environment"
            else one
            for one in named
        ),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _hardware(root: Path, distributions: set[str]) -> tuple[Hardware, ...]:
    found = []
    for entry in table()["hardware"]:
        sign = next((path for path in entry["paths"] if (root / path.lstrip("/")).exists()), None)
        if sign is not None:
            name, owner = entry["name"], entry["distribution"]
            found.append(Hardware(name, sign, owner, owner in distributions))
    return tuple(found)


def _cluster(finding: ClusterFinding) -> str:
    facts = f" ({', '.join(finding.evidence)})" if finding.evidence else ""
    world = finding.world
    place = f", rank {world.rank} of {world.size}" if world is not None else ""
    return f"{finding.environment}{place}{facts}"


def _auto(request: Request, machine: Machine) -> tuple[str, str]:
    try:
        return resolve(request, machine).plan.summary(), ""
    except DrivetrainError as problem:
        return "", str(problem)


def _todo(
    machine: Machine, hardware: tuple[Hardware, ...], installed: tuple[Installed, ...]
) -> tuple[str, ...]:
    todo = []
    if not version_of("torch"):
        todo.append("Install torch.")
    todo += [
        f"Install {one.distribution}: the system shows {one.name} ({one.sign})."
        for one in hardware
        if not one.installed
    ]
    if not machine.inventory.backends and not hardware:
        todo.append("Install drivetrain-cpu: no backend is installed, and every machine has a CPU.")
    todo += [
        f"{one.kind.capitalize()} {one.name!r} ({one.owner}): {one.problem}"
        for one in installed
        if one.problem
    ]
    if machine.cluster.problem is not None:
        todo.append(str(machine.cluster.problem))
    todo += machine.cluster.remarks
    return tuple(todo)


def _line(one: Installed) -> str:
    facts = ", ".join(part for part in (one.finding, one.problem) if part)
    return f"  {one.name} ({one.owner}){': ' if facts else ''}{facts}"
