"""What is found on machines of several kinds, and what is said where nothing is."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pynvml
import pytest
import torch

from drivetrain_cuda import nvml, probing, spec
from drivetrain_cuda.probing import TorchBuild, ask_torch, look, read_build, torch_build

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CUDA12 = TorchBuild("2.13.0+cu126", cuda="12.6")
without_driver = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")


def not_asked(env: Mapping[str, str]) -> int:
    raise AssertionError("torch was asked, though NVML had told")


def found(env: Mapping[str, str] | None = None, build: TorchBuild | None = CUDA12) -> Any:
    return look(env or {}, build, nvml.ask, not_asked)


def test_nvml_tells_how_many_and_which(answering: Callable[[str], Any]) -> None:
    recorded = answering("four-h100")
    probe = found()
    assert probe.devices == 4
    assert probe.names[0] == "NVIDIA H100 80GB HBM3 GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    assert probe.reason == ""
    assert recorded.opened == 0, "NVML is closed again"


def test_every_fact_of_a_card_is_read(answering: Callable[[str], Any]) -> None:
    answering("partitioned")
    driver = nvml.ask()
    assert (driver.version, driver.cuda) == ("535.129.03", (12, 2))
    first = driver.cards[0]
    assert first.partitioned
    assert first.instances == (
        "MIG-1f2e3d4c-aaaa-5bbb-8ccc-111111111111",
        "MIG-1f2e3d4c-aaaa-5bbb-8ccc-222222222222",
    )
    assert (first.capability, first.bus) == ((8, 0), "00000000:17:00.0")
    assert first.memory == 42949672960
    assert not driver.cards[1].partitioned


def test_the_variable_chooses(answering: Callable[[str], Any]) -> None:
    answering("four-h100")
    assert found({"CUDA_VISIBLE_DEVICES": "3,1"}).devices == 2
    probe = found({"CUDA_VISIBLE_DEVICES": "GPU-c0ffee"})
    assert probe.names == ("NVIDIA H100 80GB HBM3 GPU-c0ffee00-1b2c-4e3d-9f80-0a1b2c3d4e5f",)


def test_a_partitioned_card_is_one_device(answering: Callable[[str], Any]) -> None:
    answering("partitioned")
    assert found().names == ("NVIDIA A100-PCIE-40GB MIG-1f2e3d4c-aaaa-5bbb-8ccc-111111111111",)


def test_devices_of_other_models_are_named_without_uuids(answering: Callable[[str], Any]) -> None:
    answering("two-models")
    assert found().names == ("NVIDIA T400", "NVIDIA RTX A6000")
    assert found({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).names[1].endswith("-aaaaaaaaaaaa")


@pytest.mark.parametrize(
    ("machine", "env", "build", "said"),
    [
        ("one-a100", {}, None, ["torch is not installed"]),
        (
            "one-a100",
            {},
            TorchBuild("2.13.0+cpu"),
            ["driver 550.54.15 with 1 device", "2.13.0+cpu is built without CUDA", "get-started"],
        ),
        (
            "old-driver",
            {},
            CUDA12,
            ["driver 470.239.06", "CUDA up to 11.4", "built for 12.6", "Upgrade the driver"],
        ),
        ("no-devices", {}, CUDA12, ["with 0 devices"]),
        (
            "four-h100",
            {"CUDA_VISIBLE_DEVICES": ""},
            CUDA12,
            ["with 4 devices", "CUDA_VISIBLE_DEVICES=''", "hides all", "unset it"],
        ),
        ("four-h100", {"CUDA_VISIBLE_DEVICES": "8"}, CUDA12, ["'8'", "there are 4 devices"]),
        ("partitioned-and-empty", {}, CUDA12, ["no compute instance", "nvidia-smi mig"]),
    ],
)
def test_where_there_is_none_the_reason_says_what_was_found(
    answering: Callable[[str], Any],
    machine: str,
    env: dict[str, str],
    build: TorchBuild | None,
    said: list[str],
) -> None:
    answering(machine)
    probe = found(env, build)
    assert probe.devices == 0
    for part in said:
        assert part in probe.reason


@without_driver
def test_the_real_library_says_that_there_is_no_driver() -> None:
    with pytest.raises(nvml.NoAnswer, match="Shared Library Not Found") as caught:
        nvml.ask()
    assert caught.value.absent
    assert isinstance(caught.value.__cause__, pynvml.NVMLError_LibraryNotFound)
    probe = found()
    assert probe.devices == 0
    assert probe.reason.endswith("so there is no NVIDIA driver. Install one")


def test_a_driver_that_is_not_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert "Driver Not Loaded" in found().reason


def test_torch_is_asked_where_nvml_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as where its package is missing, and some driver is there."""

    def missing() -> nvml.Driver:
        raise nvml.NoAnswer("nvidia-ml-py is not installed")

    monkeypatch.setattr(probing, "DRIVER_PATHS", (str(tmp_path),))
    assert look({}, CUDA12, missing, lambda env: 3).devices == 3
    assert "found no device" in look({}, CUDA12, missing, lambda env: 0).reason
    assert "it ended" in look({}, CUDA12, missing, lambda env: "it ended with code 1").reason
    monkeypatch.setattr(probing, "DRIVER_PATHS", ())
    if sys.platform == "linux":
        assert "no sign of an NVIDIA driver" in look({}, CUDA12, missing, not_asked).reason


def test_torch_is_asked_about_amd_devices() -> None:
    build = TorchBuild("2.13.0+rocm6.3", hip="6.3")
    assert look({}, build, nvml.ask, lambda env: 2).devices == 2


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NoAnswer, match="nvidia-ml-py is not installed") as caught:
        nvml.ask()
    assert not caught.value.absent


def test_a_real_process_counts() -> None:
    assert ask_torch(dict(os.environ)) == torch.cuda.device_count()


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_QUESTION", "raise SystemExit('no torch here')")
    answer = ask_torch({"PATH": "", "different": "each time"})
    assert answer == "it ended with code 1: no torch here"


def test_a_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_QUESTION", "import threading; threading.Event().wait()")
    monkeypatch.setattr(probing, "TIMEOUT_S", 0.5)
    assert "did not answer" in str(ask_torch({"PATH": "", "hanging": "yes"}))


def test_the_build_is_read_from_torchs_own_file_without_importing_it() -> None:
    assert torch_build() == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


def test_builds_of_all_kinds_are_read() -> None:
    text = (
        "from typing import Optional\n__version__ = '2.6.0+cu124'\ncuda: Optional[str] = '12.4'\n"
    )
    assert read_build(text + "hip: Optional[str] = None\n") == TorchBuild("2.6.0+cu124", "12.4")
    assert read_build("__version__ = '2.6.0'\ncuda = '12.4'\n").cuda == "12.4"
    assert read_build("hip: Optional[str] = '6.2.4'").hip == "6.2.4"


def test_the_probe_never_raises_and_makes_no_context() -> None:
    """B10"""
    code = (
        "import sys; from drivetrain_cuda import spec; probe = spec.probe()\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; assert not torch.cuda.is_initialized(); print(probe.devices)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert int(done.stdout) == spec.probe().devices
