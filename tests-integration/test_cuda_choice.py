"""What a trainer says about CUDA devices on a machine without one; precisions never change."""

from __future__ import annotations

import pytest
import torch
from drivetrain import plugins
from drivetrain.plan import Request
from drivetrain.resolve import resolve
from drivetrain.survey import survey
from drivetrain_cpu.accelerator import CpuAccelerator
from drivetrain_interfaces import ConfigurationError, DrivetrainError, UnavailableError
from drivetrain_toolkit.specs import PRECISIONS

without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")


def plan(**asked):
    request = Request(**asked)
    return resolve(request, survey(request, {})).plan


def test_the_older_names_resolve_to_the_package():
    assert plugins.GPUAccelerator.__module__ == "drivetrain_cuda.accelerator"
    assert plugins.ApexMixedPrecisionPlugin.__module__ == "drivetrain_cuda.seeds"


@without_device
def test_an_automatic_choice_says_why_it_did_not_take_it():
    record = plan().explain()
    assert "considered: cuda - unavailable: NVML says:" in record
    assert plan().backend == "cpu"


@without_device
@pytest.mark.parametrize("accelerator", ["cuda", "object"])
def test_asking_for_it_is_an_error_with_what_was_found(accelerator):
    asked = plugins.GPUAccelerator() if accelerator == "object" else accelerator
    with pytest.raises((UnavailableError, ConfigurationError), match="NVML says: NVML Shared"):
        plan(accelerator=asked)


@without_device
def test_asking_for_gpus_is_an_error_and_not_a_run_on_the_host():
    with pytest.raises(DrivetrainError, match="gpus=4"):
        plan(gpus=4)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_a_precision_is_the_same_on_an_accelerator_object(precision):
    for accelerator in ("cpu", CpuAccelerator()):
        assert plan(accelerator=accelerator, precision=precision).precision == precision


@pytest.mark.parametrize("accelerator", ["cpu", "object"])
def test_a_precision_that_the_device_lacks_is_refused_by_name(accelerator):
    asked = CpuAccelerator() if accelerator == "object" else accelerator
    with pytest.raises(DrivetrainError, match=r"precision='fp8' was asked for.*bf16-mixed"):
        plan(accelerator=asked, precision="fp8")


def test_a_precision_on_an_accelerator_object_and_another_by_name_exclude_each_other():
    accelerator = CpuAccelerator(precision_plugin=plugins.DoublePrecisionPlugin())
    assert plan(accelerator=accelerator).precision == "64-true"
    with pytest.raises(ConfigurationError, match="Two parts of the kind 'precision'"):
        plan(accelerator=accelerator, precision="bf16-mixed")
