"""The spec: cheap to import, and its rules for ``devices=``."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import metadata

import pytest
from drivetrain_interfaces import CONTRACT, ConfigurationError, Probe
from drivetrain_interfaces.discovery import load_backend

from drivetrain_cuda import FACTS, parse_cuda_devices, spec

FOUR = Probe(4, names=("H100 GPU-8932f9", "H100 GPU-8932aa", "H100 GPU-c0ffee", "H100 GPU-d00dfe"))


def test_importing_the_spec_loads_neither_torch_nor_nvml() -> None:
    """B1"""
    code = (
        "import sys; from drivetrain_cuda import spec; "
        "spec.parse_devices('auto', spec.probe(), 'cuda'); "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_entry_point_yields_the_spec_under_its_own_name() -> None:
    """B2"""
    assert load_backend("cuda") is spec
    assert spec.name == "cuda"


def test_the_contract_is_served_here_and_is_the_one_told_to_the_installer() -> None:
    """B3"""
    assert CONTRACT.serves(spec.contract)
    needs = metadata.requires("drivetrain-cuda") or ()
    wanted = next(line for line in needs if line.startswith("drivetrain-interfaces"))
    assert f">={spec.contract}." in wanted


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("auto", (0, 1, 2, 3)),
        (-1, (0, 1, 2, 3)),
        ("-1", (0, 1, 2, 3)),
        (2, (0, 1)),
        ("2", (0, 1)),
        ([2], (2,)),
        ([3, 0], (3, 0)),
        ("3,0", (3, 0)),
        ((1,), (1,)),
        ("GPU-c0", (2,)),
        ("GPU-d,GPU-c", (3, 2)),
        (["GPU-8932f", 3], (0, 3)),
        ([" GPU-d".strip()], (3,)),
    ],
)
def test_devices_are_counted_or_named(request_: object, expected: tuple[int, ...]) -> None:
    assert parse_cuda_devices(request_, FOUR, "cuda") == expected


@pytest.mark.parametrize(
    "request_",
    [0, 5, "5", [4], [0, 0], [], "", True, None, 1.5, "two", "GPU-8932", "GPU-x", "MIG-1"],
)
def test_anything_else_is_refused_with_the_request_in_the_message(request_: object) -> None:
    """B7"""
    with pytest.raises(ConfigurationError) as caught:
        parse_cuda_devices(request_, FOUR, "cuda")
    assert str(request_) in str(caught.value)


def test_a_uuid_that_cannot_be_told_is_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        parse_cuda_devices("GPU-1", Probe(2, names=("T400", "A6000")), "cuda")


def test_the_spec_and_its_facts_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(FACTS)) == FACTS
    assert pickle.loads(pickle.dumps(spec)).name == "cuda"


def test_an_automatic_choice_takes_it_before_the_cpu() -> None:
    """B6"""
    assert spec.priority > 0
