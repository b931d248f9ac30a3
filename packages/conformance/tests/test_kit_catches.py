"""The kit notices backends that break a rule, each by exactly the tests that it should.

A few mutants of every kind run here. All of them are in ``mutants.toml`` and run in a session of
their own (``nox -s mutants``), which takes some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
TABLE = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))
MUTANTS = {mutant["name"]: mutant for mutant in TABLE["mutant"]}
ENOUGH = 25
SOME = (
    "mutant_imports_torch:spec",
    "probe_raises",
    "contract_of_the_future",
    "devices_forgiven",
    "clips_norms_undeclared",
    "any_precision",
    "one_accelerator_for_all",
    "sums_microbatches",
    "skips_before_zero_grad",
    "moves_what_is_not_finite",
    "state_shares_memory",
    "evaluates_with_gradients",
    "loading_trusts_content",
    "mean_is_a_sum",
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forks")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What a run of some mutants found."""
    answer = tmp_path_factory.mktemp("mutants") / "found.json"
    subprocess.run(
        [sys.executable, str(HERE / "run_mutants.py"), "--json", str(answer), *SOME],
        check=False,  # it fails where a mutant was caught by others; the tests say by which
        timeout=600,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(answer.read_text(encoding="utf-8"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SOME)
def test_a_mutant_is_caught_by_exactly_the_tests_that_should(
    found: dict[str, dict[str, object]], name: str
) -> None:
    told = found[name]
    assert told["broke"] == ""
    failed = set(told["failed"]) - set(MUTANTS[name].get("perhaps", ()))
    assert failed == set(MUTANTS[name]["caught_by"])
    assert told["passed"], "a mutant breaks one rule, and the suite ran"


def test_there_are_enough_mutants_and_each_says_what_it_breaks() -> None:
    assert len(MUTANTS) == len(TABLE["mutant"]) >= ENOUGH
    for name, mutant in MUTANTS.items():
        assert mutant["breaks"], name
        assert mutant["rules"], name
        assert mutant["caught_by"], name
        assert mutant["group"] in TABLE["groups"], name


def test_every_kind_of_mutant_is_among_those_that_run_here() -> None:
    assert {MUTANTS[name]["group"] for name in SOME} >= {"anywhere", "one device", "collectives"}
