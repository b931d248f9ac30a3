"""The doctor: what it reports on a healthy machine and on broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from drivetrain_interfaces.accelerator import DeviceFacts
from drivetrain_interfaces.backend import BackendSpec, Probe
from drivetrain_interfaces.capabilities import Capabilities
from drivetrain_interfaces.contract import CONTRACT
from drivetrain_interfaces.discovery import BackendEntry, Inventory, StrategyEntry
from drivetrain_interfaces.errors import BrokenPackageError, ClusterError

from drivetrain import doctor
from drivetrain.plan import Candidate, ClusterFinding, Machine


def entry(name="acme", devices=2, reason="", problem=None):
    spec = BackendSpec(
        name=name,
        contract=CONTRACT,
        capabilities=Capabilities(precisions=frozenset({"32-true"})),
        facts=DeviceFacts(name, "gloo", name, default_devices=1),
        strategies=("single_device", "ddp"),
        probe=lambda: Probe(devices),
        load=lambda: None,
    )
    if problem is not None:
        return BackendEntry(name, f"drivetrain-{name} 1.2", problem=problem)
    found = Probe(devices, reason, tuple(f"A{i}" for i in range(devices)))
    return BackendEntry(name, f"drivetrain-{name} 1.2", spec=spec, probe=found)


@pytest.fixture
def examine(monkeypatch, tmp_path):
    """Examines a machine that the test makes up, with a file system of its own."""

    def run(machine):
        monkeypatch.setattr(doctor, "survey", lambda request, environ: machine)
        return doctor.examine({}, root=tmp_path)

    return run


def test_reports_devices_and_the_choice(examine):
    report = examine(Machine(inventory=Inventory(backends=(entry(),))))
    assert "acme (drivetrain-acme 1.2): 2 devices (A0, A1)" in report.render()
    assert report.auto.startswith("single_device on acme")
    assert report.todo == ()


def test_a_backend_without_devices_gives_its_reason(examine):
    backends = (entry(devices=0, reason="No driver. Install acme-driver."),)
    report = examine(Machine(inventory=Inventory(backends=backends)))
    assert report.auto == ""
    assert "accelerator='auto' was asked for" in report.auto_problem
    assert report.todo == ("Backend 'acme' (drivetrain-acme 1.2): No driver. Install acme-driver.",)


def test_broken_packages_take_one_line_each(examine):
    broken = BrokenPackageError("It fell\nover.", "Mend it.")
    inventory = Inventory(
        backends=(entry(), entry("bad", problem=broken)),
        strategies=(StrategyEntry("engine", "drivetrain-engine 1.0", problem=broken),),
    )
    report = examine(Machine(inventory=inventory))
    assert report.todo == (
        "Backend 'bad' (drivetrain-bad 1.2): It fell over. Mend it. [DT104]",
        "Strategy 'engine' (drivetrain-engine 1.0): It fell over. Mend it. [DT104]",
    )


def test_without_a_backend_it_says_to_install_one(examine):
    assert examine(Machine()).todo == (
        "Install drivetrain-cpu: no backend is installed, and every machine has a CPU.",
    )


def test_hardware_without_its_package_is_pointed_out(examine, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "installed_distributions", lambda: ())
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "ipu0").touch()
    report = examine(Machine(inventory=Inventory(backends=(entry(),))))
    (found,) = report.hardware
    assert (found.sign, found.distribution, found.installed) == (
        "/dev/ipu0",
        "drivetrain-ipu",
        False,
    )
    assert report.todo[0].startswith("Install drivetrain-ipu: the system shows")


def test_a_cluster_that_cannot_be_read_is_reported(examine):
    finding = ClusterFinding(
        environment="torchrun",
        evidence=("RANK=9",),
        candidates=(Candidate("torchrun", "evidence RANK=9"),),
        problem=ClusterError("RANK=9 is outside.", "Correct it."),
    )
    report = examine(Machine(Inventory(backends=(entry(),)), finding))
    assert report.cluster == "torchrun (RANK=9)"
    assert "RANK=9 is outside. Correct it. [DT202]" in report.todo
    assert "problem: RANK=9 is outside." in report.render()


def test_json_holds_the_whole_report(examine):
    report = examine(Machine(inventory=Inventory(backends=(entry(),))))
    plain = json.loads(report.to_json())
    assert plain["installed"][0]["devices"] == 2
    assert plain.keys() == dict.fromkeys(replace(report).__slots__).keys()


def test_the_real_machine_is_examined_without_torch(tmp_path):
    code = (
        "import sys, drivetrain.doctor\n"
        "report = drivetrain.doctor.examine()\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
        "assert report.torch and report.auto, report.auto_problem\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
