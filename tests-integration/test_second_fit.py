"""A child's state comes back whole: a second fit goes on alike after every launcher."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Starter

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def found_by(start: Starter, launcher: str) -> Any:
    env = {**AS_ROOT, "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    done = start.run("twice.py", launcher, env=env)
    (line,) = [line for line in done.lines if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.fixture(scope="module")
def expected(start_once: Starter) -> Any:
    return found_by(start_once, "script")


@pytest.mark.parametrize("launcher", ["fork", "spawn", "forkserver", "notebook", "mpi"])
def test_two_fits_are_the_same_by_every_launcher(
    start: Starter, expected: Any, launcher: str
) -> None:
    if launcher == "mpi" and not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed: apt-get install openmpi-bin")
    assert found_by(start, launcher) == expected
