"""The spec: cheap to import, and its rules for ``devices=``."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import metadata

import pytest
from drivetrain_interfaces import CONTRACT, ConfigurationError, Probe
from drivetrain_interfaces.discovery import load_backend

from drivetrain_cpu import FACTS, cores, spec


def test_importing_and_probing_the_spec_loads_neither_torch_nor_numpy() -> None:
    """B1"""
    code = (
        "import sys; from drivetrain_cpu import spec; spec.probe(); "
        "spec.parse_devices(2, spec.probe(), 'cpu'); "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_entry_point_yields_the_spec_under_its_own_name() -> None:
    """B2"""
    assert load_backend("cpu") is spec
    assert spec.name == "cpu"


def test_the_contract_is_served_here_and_is_the_one_told_to_the_installer() -> None:
    """B3"""
    assert CONTRACT.serves(spec.contract)
    wanted = next(
        line
        for line in metadata.requires("drivetrain-cpu") or ()
        if line.startswith("drivetrain-interfaces")
    )
    assert f">={spec.contract}." in wanted


def test_the_probe_counts_the_cores_that_this_process_may_use() -> None:
    """B10"""
    assert spec.probe() == Probe(devices=cores())
    assert cores() >= 1


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("auto", (0,)),
        (-1, (0,)),
        ("-1", (0,)),
        (1, (0,)),
        (3, (0, 1, 2)),
        ("2", (0, 1)),
    ],
)
def test_devices_is_a_number_of_processes_that_may_exceed_the_cores(
    request_: object, expected: tuple[int, ...]
) -> None:
    assert spec.parse_devices(request_, Probe(devices=1), "cpu") == expected


@pytest.mark.parametrize("request_", [0, -2, "0", "two", True, 1.5, None, [0, 1], (0,), "0,1", ""])
def test_anything_else_is_refused_with_the_request_and_the_cores_in_the_message(
    request_: object,
) -> None:
    """B7"""
    with pytest.raises(ConfigurationError) as caught:
        spec.parse_devices(request_, Probe(devices=7), "cpu")
    assert repr(request_) in str(caught.value)
    assert "7 cores" in str(caught.value)


def test_the_spec_and_its_facts_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(FACTS)) == FACTS
    assert pickle.loads(pickle.dumps(spec.capabilities)) == spec.capabilities
    assert pickle.loads(pickle.dumps(spec)).name == "cpu"


def test_it_comes_last_in_an_automatic_choice() -> None:
    """B6"""
    assert spec.priority == 0
