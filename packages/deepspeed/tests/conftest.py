"""Two real processes over gloo that answer cases of ``ranks/deepspeed_cases.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drivetrain_conformance.support.crew import SteadyCrew

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent / "ranks"))  # for tests, and for what they start
VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[SteadyCrew]:
    """Two processes for all tests, since starting them takes seconds."""
    crew = SteadyCrew("cpu", (0, 1), VARIABLES)
    yield crew
    crew.stop()


@pytest.fixture(scope="session")
def on_two_ranks(two_ranks):
    """Runs named cases on both, and returns what rank 0 answered to each."""

    def run(*names: str):
        return {
            name: two_ranks.run(f"deepspeed_cases:{name}", name, seconds=600.0)[0] for name in names
        }

    return run
