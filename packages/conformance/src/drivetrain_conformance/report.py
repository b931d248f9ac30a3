"""The report of a run, as JSON. Its schema, ``report.schema.json``, is beside this file."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import platform
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import CONTRACT

from drivetrain_conformance import version

if TYPE_CHECKING:
    from drivetrain_interfaces import Capabilities

    from drivetrain_conformance.run import ConformanceRun
    from drivetrain_conformance.target import Found, Target

#: Changes when a reader of reports would have to.
SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("report.schema.json")


class Verdict(str, Enum):
    """What a run says about the backend."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_A_CONFORMANCE_RUN = "not a conformance run"


def build_report(run: ConformanceRun) -> dict[str, Any]:
    """Everything about a run that ended, as JSON values."""
    now = dt.datetime.now(dt.timezone.utc)
    return {
        "schema": SCHEMA_VERSION,
        "kit": {"version": version(), "contract": str(CONTRACT)},
        "verdict": run.verdict.value,
        "level": run.options.level,
        "deviations": list(run.deviations),
        "problems": list(run.problems),
        "backend": _backend(run.target),
        "strategy": _strategy(run.target),
        "counts": dict(run.tally.counts()),
        "levels": {
            str(level): dict(run.tally.counts(level)) for level in range(run.options.level + 1)
        },
        "tests": [
            {
                "name": record.name,
                "level": record.level,
                "rules": list(record.rules),
                "outcome": record.outcome.value,
                "reason": record.reason,
                "seconds": round(record.seconds, 3),
            }
            for record in run.tally.records.values()
        ],
        "expectations": [
            {**dataclasses.asdict(entry), "until": entry.until.isoformat()}
            for entry in run.expectations
        ],
        "environment": _environment(),
        "started": run.started.isoformat(timespec="seconds"),
        "seconds": round((now - run.started).total_seconds(), 1),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report where it was asked for, with the folders that lead there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _backend(target: Target) -> dict[str, Any]:
    spec = target.spec
    return {
        "name": spec.name,
        **_origin(target.backend),
        "contract": str(spec.contract),
        "device_type": spec.facts.device_type,
        "strategies": list(spec.strategies),
        "capabilities": _capabilities(spec.capabilities),
    }


def _strategy(target: Target) -> dict[str, Any] | None:
    if target.strategy_name is None:
        return None
    if target.strategy is None or target.strategy_spec is None:
        return {
            "name": target.strategy_name,
            "capabilities": _capabilities(target.capabilities),
        }
    return {
        "name": target.strategy_name,
        **_origin(target.strategy),
        "contract": str(target.strategy_spec.contract),
        "device_types": sorted(target.strategy_spec.device_types),
        "capabilities": _capabilities(target.strategy_spec.capabilities),
    }


def _origin(found: Found) -> dict[str, Any]:
    return {
        "owner": found.owner,
        "reference": found.reference,
        "registered": found.entry_point is not None,
    }


def _capabilities(capabilities: Capabilities) -> dict[str, list[str]]:
    return {
        "features": sorted(_name(feature) for feature in capabilities.features),
        "precisions": sorted(capabilities.precisions),
        "hooks": sorted(_name(hook) for hook in capabilities.hooks),
    }


def _name(ability: Any) -> str:
    """The name of an ability, also of one that the contract does not know."""
    return str(getattr(ability, "value", ability))


def _environment() -> dict[str, Any]:
    packages = {"torch", "numpy", "pytest"}
    installed = {
        name: dist.version
        for dist in metadata.distributions()
        if (name := (dist.metadata["Name"] or "").lower()) in packages
        or name.startswith("drivetrain")
    }
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "packages": dict(sorted(installed.items())),
    }
