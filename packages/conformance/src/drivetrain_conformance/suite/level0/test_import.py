"""Importing a spec is free of torch, of the vendor, and of side effects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_conformance.support import fresh
from drivetrain_conformance.target import STARTED_WITH

if TYPE_CHECKING:
    from drivetrain_conformance.target import Found, Target

#: Small and pure; a spec may want them.
HARMLESS = {"packaging", "typing_extensions", "tomli"}


def ask(reference: str, *, probe: bool, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The answer of a fresh interpreter; see ``support.fresh``."""
    question = json.dumps({"reference": reference, "probe": probe, "path": sys.path})
    done = subprocess.run(  # noqa: S603 - our own interpreter and script
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", fresh.__file__, question],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=STARTED_WITH if env is None else env,
    )
    assert done.returncode == 0, (
        f"{reference} must import in a fresh interpreter, and there it ended with "
        f"{done.returncode}: {done.stderr.strip()[-2000:]}"
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def imported(target: Target) -> list[tuple[Found, dict[str, Any]]]:
    """What importing each spec under test does."""
    parts = [target.backend, *([target.strategy] if target.strategy else [])]
    return [(part, ask(part.reference, probe=False)) for part in parts]


def test_importing_the_spec_loads_neither_torch_nor_the_vendor(
    imported: list[tuple[Found, dict[str, Any]]],
) -> None:
    """Listing backends must cost nothing and break nothing.

    R: B1
    """
    for found, told in imported:
        own = {found.module.partition(".")[0], *own_modules(found.distribution)}
        foreign = {
            name
            for name in told["loaded"]
            if name not in own | HARMLESS | set(told["standard"])
            and not name.startswith(("drivetrain", "_distutils", "__"))
        }
        assert not foreign, (
            f"B1: the module that holds the spec imports neither torch nor the vendor's library; "
            f"importing {found.module} loads {sorted(foreign)}. Import them in probe or load."
        )


def own_modules(distribution: str | None) -> list[str]:
    """The top-level modules of a distribution."""
    if distribution is None:
        return []
    found = metadata.packages_distributions()
    return [module for module, owners in found.items() if distribution in owners]


def test_importing_the_spec_changes_nothing(
    imported: list[tuple[Found, dict[str, Any]]],
) -> None:
    """Other packages, and the user's own program, run in the same process.

    R: B1
    """
    for found, told in imported:
        assert not told["changed"], (
            "B1: importing the spec starts nothing and changes no environment variable, signal "
            f"handler or logging setting; importing {found.module} changed {told['changed']}"
        )


@pytest.fixture(scope="module")
def probed(target: Target) -> dict[str, Any]:
    """What probing in a fresh interpreter does."""
    return ask(target.backend.reference, probe=True)


def test_the_probe_does_not_raise_in_a_fresh_process(probed: dict[str, Any]) -> None:
    """A machine without the device is the usual case.

    R: B8
    """
    assert "raised" not in probed, f"B8: probe() never raises; it raised {probed.get('raised')}"


def test_the_probe_does_not_raise_in_a_bare_environment(target: Target) -> None:
    """Tools that a probe may want are not on every PATH, and some processes have no home.

    R: B8
    """
    keep = {k: v for k, v in os.environ.items() if k in {"LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR"}}
    told = ask(target.backend.reference, probe=True, env={**keep, "PATH": ""})
    assert "raised" not in told, (
        f"B8: probe() never raises, also without PATH and HOME; it raised {told.get('raised')}"
    )


def test_the_probe_opens_no_device(probed: dict[str, Any]) -> None:
    """A process that only plans must leave devices to the processes that train.

    R: B8
    """
    assert "raised" not in probed, f"B8: probe() never raises; it raised {probed.get('raised')}"
    assert not probed["changed_by_probe"], (
        "B8: probe() opens no device, starts nothing and changes nothing; it changed "
        f"{probed['changed_by_probe']}"
    )
    assert not probed["initialized"], "B8: probe() creates no context; torch says that there is one"


def test_the_probe_is_quick_and_stable(probed: dict[str, Any]) -> None:
    """It runs whenever somebody asks what is installed.

    R: B8
    """
    assert "raised" not in probed, f"B8: probe() never raises; it raised {probed.get('raised')}"
    assert probed["seconds"] < 1, (
        f"B8: probe() takes at most a fraction of a second; it took {probed['seconds']:.1f} s"
    )
    assert len(set(probed["probes"])) == 1, (
        f"B8: probe() says the same when asked again; it said {probed['probes']}"
    )
