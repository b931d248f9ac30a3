"""The spec: torch-free, and never a CPU that nobody asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from drivetrain_interfaces import CONTRACT
from drivetrain_interfaces.discovery import load_backend

from drivetrain_xla import probing, spec
from drivetrain_xla.probing import look


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def bus(tmp_path):
    """A folder that looks like the one in which the kernel lists PCI devices."""

    def make(*chips):
        for number, (vendor, device) in enumerate(chips):
            folder = tmp_path / f"0000:00:{number:02x}.0"
            folder.mkdir()
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "device").write_text(f"{device}\n")
        return tmp_path

    return make


def test_importing_and_probing_load_neither_torch_nor_torch_xla():
    """B1"""
    code = (
        "import sys; from drivetrain_xla import spec; spec.probe(); "
        "print([m for m in ('torch', 'torch_xla', 'numpy') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_the_entry_point_yields_the_spec():
    """B2"""
    assert load_backend("xla") is spec
    assert CONTRACT.serves(spec.contract)


def test_a_machine_without_a_tpu_has_no_device(bus):
    found = look({}, bus(("0x8086", "0x1237")))
    assert found.devices == 0
    assert "PJRT_DEVICE=CPU" in found.reason
    assert look({"PJRT_DEVICE": "TPU"}, bus()).devices == 0


def test_a_cpu_is_there_only_if_it_is_asked_for():
    assert look({"PJRT_DEVICE": "CPU"}).names == ("CPU:0",)
    assert look({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}).devices == 4


@pytest.mark.parametrize("text", ["0", "-1", "four", "²"])
def test_a_number_of_devices_that_is_none_is_told(text):
    found = look({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": text})
    assert found.devices == 0
    assert text in found.reason


def test_another_runtime_is_not_taken():
    found = look({"PJRT_DEVICE": "NEURON"})
    assert found.devices == 0
    assert "NEURON" in found.reason


def test_chips_are_counted_by_what_they_are(bus):
    v5e, unknown, foreign = ("0x1ae0", "0x0063"), ("0x1ae0", "0xffff"), ("0x10de", "0x0063")
    pci = bus(v5e, v5e, unknown, foreign)
    library = {"TPU_LIBRARY_PATH": "/lib/libtpu.so"}
    assert look(library, pci).names == ("TPU:0", "TPU:1")
    assert look({**library, "TPU_VISIBLE_CHIPS": "0"}, pci).devices == 1


def test_an_old_chip_is_two_devices(bus):
    assert look({"TPU_LIBRARY_PATH": "x"}, bus(("0x1ae0", "0x0027"))).devices == 2


def test_chips_without_their_library_are_told(bus):
    found = look({}, bus(("0x1ae0", "0x006f")))
    assert found.devices == 0
    assert "drivetrain-xla[tpu]" in found.reason


def test_a_bus_that_is_not_there_is_no_error(tmp_path):
    assert look({}, tmp_path / "nothing").devices == 0


def test_a_torch_of_another_version_is_told(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "torch_xla": "2.9.0"}
    monkeypatch.setattr(probing.metadata, "version", versions.__getitem__)
    reason = look({"PJRT_DEVICE": "CPU"}).reason
    assert "2.13.0" in reason
    assert "2.9.0" in reason


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setattr(probing.util, "find_spec", lambda name: None)
    assert "torch_xla is not installed" in look({"PJRT_DEVICE": "CPU"}).reason


def test_on_a_cpu_every_other_backend_comes_first():
    code = "from drivetrain_xla import spec; print(spec.priority)"
    assert run(code, PJRT_DEVICE="CPU") == "0"
    assert int(run(code)) > 0


def test_torch_xla_taking_a_cpu_by_itself_is_refused():
    code = (
        "from drivetrain_interfaces import UnavailableError\n"
        "from drivetrain_xla.runtime import open_runtime\n"
        "try:\n    open_runtime()\nexcept UnavailableError as error:\n    print(error)"
    )
    assert "nobody asked for" in run(code)
