"""Packages with foreign names, good and bad, beside the real ones, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAKES = Path(__file__).parent / "fakes"
GOOD = ("npu", "lockstep")
BAD = ("broken", "shaky", "future", "left", "right")

INVENTORY = """
import json, sys
from drivetrain_interfaces.discovery import take_inventory

inventory = take_inventory(*{arguments!r})
print(json.dumps({{
    "backends": {{
        e.name: [e.owner, str(e.problem or ""), e.probe.devices if e.probe else None]
        for e in inventory.backends
    }},
    "strategies": {{e.name: [e.owner, str(e.problem or "")] for e in inventory.strategies}},
    "modules": [name for name in sys.modules if name.startswith(("acme", "torch", "numpy"))],
}}))
"""


def _python(code: str, fakes: tuple[str, ...]) -> str:
    """What a fresh interpreter prints in which these packages are installed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DRIVETRAIN")}
    path = os.pathsep.join(str(FAKES / fake) for fake in fakes)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**kept, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _inventory(fakes: tuple[str, ...], *arguments: str) -> dict[str, Any]:
    return json.loads(_python(INVENTORY.format(arguments=arguments), fakes))


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    """The inventory with all packages installed, good and bad."""
    return _inventory(GOOD + BAD)


def test_a_foreign_backend_and_strategy_are_found_with_their_owners() -> None:
    found = _inventory(GOOD)
    assert found["backends"]["npu"] == ["acme-npu 1.2.0", "", 2]
    assert found["strategies"]["lockstep"] == ["acme-lockstep 0.4.0", ""]
    assert found["backends"]["cpu"][1] == ""


def test_bad_packages_change_nothing_for_the_good_ones(everything: dict[str, Any]) -> None:
    good = _inventory(GOOD)
    for name in ("npu", "cpu"):
        assert everything["backends"][name] == good["backends"][name]
    assert everything["strategies"] == good["strategies"]


@pytest.mark.parametrize(
    ("name", "owner", "problem"),
    [
        ("broken", "acme-broken 0.1.0", "ImportError: libacme.so.3"),
        ("shaky", "acme-shaky 0.2.0", "its probe raised OSError: the driver is asleep"),
        ("future", "acme-future 9.0.0", "was written for contract 99.0"),
        ("twin", "acme-left 1.0.0", "both register 'twin'"),
        ("twin", "acme-right 2.0.0", "both register 'twin'"),
    ],
)
def test_each_bad_package_is_one_problem_that_names_it(
    everything: dict[str, Any], name: str, owner: str, problem: str
) -> None:
    owners, text, devices = everything["backends"][name]
    assert owner in owners
    assert owner in text
    assert problem in text
    assert devices is None


def test_taking_an_inventory_loads_no_torch(everything: dict[str, Any]) -> None:
    assert [m for m in everything["modules"] if m.startswith(("torch", "numpy"))] == []


def test_naming_a_backend_imports_no_other_package() -> None:
    found = _inventory(GOOD + BAD, "npu")
    backends = {m for m in found["modules"] if m.startswith("acme")} - {"acme_lockstep"}
    assert backends == {"acme_npu"}
    assert found["backends"]["npu"][2] == 2
    assert found["backends"]["broken"] == ["acme-broken 0.1.0", "", None]


def test_the_doctor_has_one_line_for_each_package() -> None:
    code = (
        "import sys; from drivetrain.doctor import examine; print(examine().render())\n"
        "assert 'acme_npu.backend' not in sys.modules"
    )
    lines = _python(code, GOOD + BAD).splitlines()
    for name, wanted in {
        "npu": "acme-npu 1.2.0",
        "broken": "libacme.so.3",
        "shaky": "the driver is asleep",
        "future": "contract 99.0",
        "twin": "both register",
        "lockstep": "acme-lockstep 0.4.0",
    }.items():
        found = [line for line in lines if line.startswith(f"  {name} (")]
        assert len(found) == 1, (name, lines)
        assert wanted in found[0]


def test_auto_takes_the_backend_with_the_highest_priority_that_works() -> None:
    code = "from drivetrain.doctor import examine; print(examine().auto)"
    assert "npu" in _python(code, GOOD + BAD)
    assert "npu" not in _python(code, BAD)
    assert "cpu" in _python(code, BAD)


FIT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from drivetrain import Module, Trainer

class Line(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.manual_seed(0)
module = Line()
before = module.line.weight.detach().clone()
trainer = Trainer({arguments}, max_steps=2, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2))
assert trainer.global_step == 2
assert not torch.equal(module.line.weight.detach(), before)
print(trainer.explain())
"""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("accelerator='auto'", "acme-npu 1.2.0"),
        ("accelerator='npu', devices=[1], precision='bf16-mixed'", "acme-npu 1.2.0"),
        ("accelerator='cpu', strategy='lockstep'", "lockstep"),
    ],
    ids=["auto", "by-name", "foreign-strategy"],
)
def test_the_trainer_trains_on_a_package_it_has_never_heard_of(arguments: str, wanted: str) -> None:
    assert wanted in _python(FIT.format(arguments=arguments), GOOD + BAD)


REFUSED = {
    "accelerator='broken'": ("acme-broken 0.1.0", "libacme.so.3", "[DT104]"),
    "accelerator='future'": ("acme-future 9.0.0", "contract 99.0", "[DT103]"),
    "accelerator='shaky'": ("acme-shaky 0.2.0", "the driver is asleep", "[DT104]"),
    "accelerator='twin'": ("acme-left 1.0.0", "acme-right 2.0.0", "[DT104]"),
    "accelerator='npuu'": ("'npuu'", "nearest name", "[DT101]"),
    "accelerator='npu', devices=3": ("devices=3", "found 2", "[DT201]"),
    "accelerator='npu', precision='64-true'": ("64-true", "acme-npu 1.2.0", "[DT105]"),
}
ASK = """
import json
from drivetrain import Trainer
from drivetrain_interfaces import DrivetrainError

def said(arguments):
    try:
        eval(f"Trainer({arguments})")
    except DrivetrainError as error:
        return str(error)

print(json.dumps({arguments: said(arguments) for arguments in %r}))
"""


@pytest.fixture(scope="module")
def refusals() -> dict[str, str | None]:
    """What each of these trainers says when it is constructed."""
    return json.loads(_python(ASK % list(REFUSED), GOOD + BAD))


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_bad_package_asked_for_by_name_is_one_clear_error(
    refusals: dict[str, str | None], arguments: str
) -> None:
    text = refusals[arguments]
    assert text is not None, "nothing was raised"
    for part in REFUSED[arguments]:
        assert part in text
