"""The fake Gaudi software in place of Intel's, for this process and those that tests start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Another folder is for the run of mutants.
FAKE = Path(os.environ.get("DRIVETRAIN_FAKE_SDK") or Path(__file__).parent / "fake_sdk")
_LOCKS = tempfile.TemporaryDirectory(prefix="drivetrain-gaudi-")
#: Seconds for a script, on a machine that is busy with other things.
PATIENCE = 300
#: torch warns of a NumPy that is not there, and nothing here needs it.
WARNINGS = ("-W", "error::UserWarning", "-W", "ignore:Failed to initialize NumPy:UserWarning")
PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HLS_MODULE_ID", "ID")
GAUDI = {"cards": 4, "locks": _LOCKS.name}

sys.path.insert(0, str(FAKE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")])
os.environ["DRIVETRAIN_FAKE_GAUDI"] = json.dumps(GAUDI)
for _name in ("PT_HPU_LAZY_MODE", "HLS_MODULE_ID", "HABANA_VISIBLE_MODULES", "ID"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def places() -> Iterator[None]:
    """What says which rank and module a process has is as it was, after each test."""
    before = {name: os.environ.get(name) for name in PLACES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def gaudi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Change what the fake is like, for this test and what it starts; with locks of its own."""

    def change(**options: Any) -> None:
        mine = {**GAUDI, "locks": str(tmp_path / "locks"), **options}
        monkeypatch.setenv("DRIVETRAIN_FAKE_GAUDI", json.dumps(mine))

    return change


@pytest.fixture
def run_python(
    tmp_path: Path, gaudi: Callable[..., None]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a fresh interpreter, on four cards that nobody holds; it must succeed."""
    gaudi()

    def run(
        script: str, *arguments: str, expect: int = 0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "script.py"
        file.write_text(script, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, *WARNINGS, str(file), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def record() -> dict[str, Any]:
    """The recorded names and signatures of the vendor's software."""
    text = Path(__file__).with_name("signatures.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="session")
def device() -> Any:
    """The device of this process, opened by the accelerator, in eager mode."""
    from drivetrain_hpu.accelerator import HpuAccelerator

    return HpuAccelerator().activate(0, 1)
