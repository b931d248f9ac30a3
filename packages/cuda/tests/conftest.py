"""NVML with recorded answers, and a summary of what a run without a device did check."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml
import pytest

from drivetrain_cuda import spec

if TYPE_CHECKING:
    from collections.abc import Callable

ANSWERS: dict[str, Any] = json.loads(
    Path(__file__).with_name("nvml_answers.json").read_text(encoding="utf-8")
)


class Recorded:
    """The functions of NVML, with the answers of one machine."""

    def __init__(self, machine: dict[str, Any]) -> None:
        self.machine = machine
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return str(self.machine["driver"])

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return int(self.machine["cuda"])

    def nvmlDeviceGetCount(self) -> int:
        return len(self.machine["devices"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        assert self.opened == 1
        return self.machine["devices"][index]

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(handle["name"])

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        major, minor = handle["capability"]
        return major, minor

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return SimpleNamespace(busId=handle["bus"])

    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: Any = None) -> Any:
        return SimpleNamespace(total=handle["memory"])

    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:
        if device["mig"] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(bool(device["mig"])), int(bool(device["mig"]))]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:
        return len(device["mig"])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any:
        if device["mig"][index] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return {"uuid": device["mig"][index]}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recorded]:
    """Make the real ``pynvml`` answer as a machine of the file does."""

    def answer(name: str) -> Recorded:
        recorded = Recorded(ANSWERS[name])
        for function, _ in inspect.getmembers(Recorded, inspect.isfunction):
            if not function.startswith("nvml"):
                continue
            own = getattr(recorded, function)
            real = inspect.signature(getattr(pynvml, function))
            assert list(inspect.signature(own).parameters) == list(real.parameters), function
            monkeypatch.setattr(pynvml, function, own)
        return recorded

    return answer


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a run without a device checked, and what it left out."""
    found = spec.probe()
    passed = len(terminalreporter.stats.get("passed", ()))
    say = terminalreporter.write_line
    if found.devices:
        say(f"drivetrain-cuda: ran on {', '.join(found.names) or f'{found.devices} devices'}.")
        return
    say(f"drivetrain-cuda: skipped what needs a device. {found.reason}.")
    say(
        f"drivetrain-cuda: checked without one ({passed} tests): the spec, probing by NVML's "
        "answers and by a real subprocess, CUDA_VISIBLE_DEVICES beside torch's own parser, "
        "refusals, TF32 settings, cores near a device, the launcher."
    )
