"""The specs: cheap to import, and each name loads what it says."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from drivetrain_interfaces import CONTRACT, ConfigurationError, Feature, StepHook
from drivetrain_interfaces.discovery import STRATEGIES, load_strategy, registrations

from drivetrain_deepspeed import DeepSpeedStrategy, spec

NAMES = [name for name in registrations(STRATEGIES) if name.startswith("deepspeed")]


def test_importing_the_spec_loads_neither_torch_nor_deepspeed():
    code = (
        "import sys; from drivetrain_deepspeed import spec; "
        "print([m for m in ('torch', 'deepspeed', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_each_name_yields_its_spec(name):
    found = load_strategy(name)
    assert found.name == name
    assert CONTRACT.serves(found.contract)


def test_the_contract_is_the_one_told_to_the_installer():
    wanted = next(
        line
        for line in metadata.requires("drivetrain-deepspeed") or ()
        if line.startswith("drivetrain-interfaces")
    )
    assert f">={spec.contract}." in wanted


def test_names_stand_for_stages_and_offload():
    made = {name: load_strategy(name).load() for name in NAMES}
    stages = {name: strategy.stage for name, strategy in made.items()}
    assert stages == {
        "deepspeed": 2,
        "deepspeed_stage_0": 0,
        "deepspeed_stage_1": 1,
        "deepspeed_stage_1_offload": 1,
        "deepspeed_stage_2": 2,
        "deepspeed_stage_2_offload": 2,
        "deepspeed_stage_3": 3,
        "deepspeed_stage_3_offload": 3,
        "deepspeed_stage_3_offload_nvme": 3,
    }
    assert made["deepspeed_stage_3_offload"].options.offload_parameters == "cpu"


def test_what_the_engine_owns_is_not_declared():
    assert Feature.MANUAL_STEP not in spec.capabilities
    assert Feature.SEVERAL_OPTIMIZERS not in spec.capabilities
    assert Feature.CLIP_VALUE not in spec.capabilities
    assert StepHook.BEFORE_OPTIMIZER_STEP not in spec.capabilities.hooks
    assert StepHook.BEFORE_ZERO_GRAD not in spec.capabilities.hooks


def test_an_option_that_it_does_not_take_is_refused_with_those_that_it_takes():
    with pytest.raises(ConfigurationError, match=r"\['stages'\]; it takes .*'stage'"):
        DeepSpeedStrategy(stages=2)
