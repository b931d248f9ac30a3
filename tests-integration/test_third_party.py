"""Packages of strangers, installed by pip from wheels into an environment of their own.

``test_discovery.py`` looks at the same packages more closely, without installing them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
import venv
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., subprocess.CompletedProcess[str]]

FAKES = Path(__file__).parent / "fakes"
GOOD = ("npu", "lockstep")
BAD = ("broken", "shaky", "future", "left", "right")
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

MODEL = """
import torch
from drivetrain import DataModule, Module
from torch.utils.data import DataLoader, TensorDataset


class Line(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_fit_end(self):
        print("strategy", type(self.trainer.runtime.stack.strategy).__name__)
        print("accelerator", type(self.trainer.runtime.stack.accelerator).__name__)


class Ones(DataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
"""
FIT = (
    "fit", "--model=line.Line", "--data=line.Ones", "--trainer.max_steps=2",
    "--trainer.logger=false", "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
)  # fmt: skip


def _wheel(source: Path, folder: Path) -> Path:
    """A wheel of one of the fakes: its files, and the three that every wheel has."""
    info = next(source.glob("*.dist-info")).name
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }
    files[f"{info}/WHEEL"] = WHEEL.encode()
    records = [
        f"{name},sha256={urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},"
        f"{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*records, f"{info}/RECORD,,", ""]).encode()
    wheel = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs ``python`` with these words in a fresh environment above the one of the tests.

    What the tests' own environment has can be imported there; only the strangers are installed.
    """
    folder = tmp_path_factory.mktemp("third-party")
    home = folder / "env"
    venv.create(home, symlinks=os.name != "nt")
    layout = {"base": str(home), "platbase": str(home)}
    below = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site = Path(sysconfig.get_path("purelib", vars=layout))
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(below)]
    (site / "below.pth").write_text("".join(lines))
    python = Path(sysconfig.get_path("scripts", vars=layout)) / "python"
    (folder / "line.py").write_text(MODEL)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DRIVETRAIN", "PYTHONPATH"))}

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(python), "-m", *words],
            cwd=folder, env=kept, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    wheels = [str(_wheel(FAKES / fake, folder)) for fake in GOOD + BAD]
    run("pip", "install", "-q", "--no-index", "--no-deps", "--disable-pip-version-check", *wheels)
    return run


def test_the_doctor_has_one_line_for_each_of_them_and_ends_well(environment: Command) -> None:
    lines = environment("drivetrain", "doctor").stdout.splitlines()
    for name, *wanted in (
        ("npu", "acme-npu 1.2.0", "2 devices"),
        ("lockstep", "acme-lockstep 0.4.0"),
        ("broken", "acme-broken 0.1.0", "ImportError: libacme.so.3", "[DT104]"),
        ("shaky", "acme-shaky 0.2.0", "its probe raised OSError: the driver is asleep", "[DT104]"),
        ("future", "acme-future 9.0.0", "written for contract 99.0", "[DT103]"),
        ("twin", "acme-left 1.0.0", "acme-right 2.0.0", "both register 'twin'", "[DT104]"),
    ):
        found = [line for line in lines if line.startswith(f"  {name} (")]
        assert len(found) == 1, (name, lines)
        assert all(part in found[0] for part in wanted), found
    assert any("  cpu (drivetrain-cpu " in line for line in lines)


def test_auto_takes_the_stranger_with_the_highest_priority(environment: Command) -> None:
    plan = environment("drivetrain", "plan").stdout
    assert plan.startswith("plan: single_device on npu")
    assert "brought by acme-npu 1.2.0" in plan
    assert "accelerator NpuAccelerator" in environment("drivetrain", *FIT).stdout


def test_the_command_line_trains_on_both_by_name(environment: Command) -> None:
    words = ("--trainer.accelerator=npu", "--trainer.strategy=lockstep")
    printed = environment("drivetrain", *FIT, *words).stdout
    assert "strategy Lockstep" in printed
    assert "accelerator NpuAccelerator" in printed


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("broken", "acme-broken 0.1.0 registers 'broken'"),
        ("shaky", "acme-shaky 0.2.0 could not probe"),
        ("future", "acme-future 9.0.0 was written for contract 99.0"),
        ("twin", "both register 'twin' in the group 'drivetrain.backends'"),
    ],
)
def test_naming_a_broken_one_is_one_message_without_a_traceback(
    environment: Command, name: str, wanted: str
) -> None:
    done = environment("drivetrain", "plan", "--accelerator", name, code=2)
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_the_stranger_auto_is_what_it_was(environment: Command) -> None:
    environment("pip", "uninstall", "-q", "-y", "acme-npu")
    assert environment("drivetrain", "plan").stdout.startswith("plan: single_device on cpu")
