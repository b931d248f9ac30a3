"""Launchers that send the function: forkserver, notebook, mpi, slurm, ray, kubeflow.

Those with a manager of their own really run in tests-integration/clusters.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from drivetrain_interfaces.errors import ClusterError, NotFoundError, UserCodeError
from drivetrain_interfaces.launcher import LaunchRequest

from drivetrain_toolkit import launchers
from drivetrain_toolkit.launchers import KubeflowLauncher, SlurmLauncher, scripts

if TYPE_CHECKING:
    from pathlib import Path

TWO = LaunchRequest(local_size=2)
BY_VALUE = """
import sys
from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers


class Kept:
    def __init__(self, rank):
        self.rank = rank


def work(world):
    print("out", "of", world.rank, flush=True)
    print(f"error of {world.rank}", file=sys.stderr)
    if world.rank == FAILING:
        raise ValueError("bad luck")
    return Kept(world.rank), [os.environ.get("RANK"), "torch" in sys.modules]


FAILING = int(sys.argv[1])
import os

launcher = launchers.notebook()
result, facts = launcher.launch(work, launcher.plan(LaunchRequest(local_size=2)))
assert type(result) is Kept, type(result)
print("result", result.rank, *facts)
left = [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("drivetrain")]
assert not left, left
"""


@pytest.fixture(autouse=True)
def nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "DRIVETRAIN_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def by_value(folder: Path, failing: int) -> subprocess.CompletedProcess[str]:
    (folder / "here.py").write_text(BY_VALUE)
    return subprocess.run(
        [sys.executable, "here.py", str(failing)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TMPDIR": str(folder)},
        check=False,
    )


def test_a_notebook_sends_its_own_classes_and_shows_what_every_rank_prints(tmp_path: Path) -> None:
    done = by_value(tmp_path, failing=7)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"out of 0", "[rank 1] out of 1"} <= set(lines)
    assert lines[-1] == "result 0 0 False", "it is fresh: nothing has imported torch"
    assert {"error of 0", "[rank 1] error of 1"} <= set(done.stderr.splitlines())


def test_a_failure_in_a_fresh_process_comes_back_with_its_line_of_code(tmp_path: Path) -> None:
    done = by_value(tmp_path, failing=1)
    assert done.returncode == 1
    assert "rank 1 on" in done.stderr
    assert 'raise ValueError("bad luck")' in done.stderr


def lambda_of(value: Any) -> Any:
    return lambda world: value


@pytest.mark.parametrize("name", ["notebook", "mpi", "slurm", "ray"])
def test_what_cannot_be_sent_is_an_error_that_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for program in ("mpirun", "srun"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if name == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    launcher = getattr(launchers, name)()
    plan = launcher.plan(TWO)
    with (tmp_path / "x").open("w") as file, pytest.raises(UserCodeError, match=f"'{name}'"):
        launcher.launch(lambda_of(file), plan)


@pytest.mark.parametrize(("name", "program"), [("mpi", "mpirun"), ("slurm", "srun")])
def test_a_missing_program_is_named(
    name: str, program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFoundError, match=f"no program '{program}'"):
        getattr(launchers, name)().plan(TWO)


@pytest.mark.parametrize("name", ["mpi", "slurm", "ray", "notebook"])
def test_what_can_only_be_refused_is_refused_in_the_plan(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="at least one process"):
        getattr(launchers, name)().plan(LaunchRequest(local_size=0))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "j")
    for variable, value in (("RANK", 0), ("WORLD_SIZE", 1)):
        monkeypatch.setenv(variable, str(value))
    with pytest.raises(ClusterError, match="one of several"):
        getattr(launchers, name)().plan(TWO)


def test_missing_cloudpickle_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(NotFoundError, match=r"Install drivetrain-toolkit\[remote\]"):
        launchers.notebook().plan(TWO)


def test_missing_ray_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NotFoundError, match=r"Install drivetrain-toolkit\[ray\]"):
        launchers.ray().plan(TWO)


def test_the_command_of_srun_and_of_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for program in ("srun", "sbatch"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    request = LaunchRequest(local_size=2, num_nodes=3)
    now = SlurmLauncher(("--partition=gpu",)).plan(request).command
    assert now[:4] == ("srun", "--nodes=3", "--ntasks=6", "--ntasks-per-node=2")
    assert "--partition=gpu" in now
    queued = SlurmLauncher(("--partition=gpu",), batch=True).plan(request).command
    assert queued[:2] == ("sbatch", "--wait")
    assert queued.index("--partition=gpu") < queued.index("--wrap") < queued.index("srun")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert "--overlap" in SlurmLauncher().plan(request).command


def test_kubeflow_writes_the_manifest_and_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("/usr/bin/python", "train.py", "--epochs", "3")
    monkeypatch.setattr(
        "drivetrain_toolkit.launchers.manifests.this_script", lambda: scripts.Script(command, "/")
    )
    path = tmp_path / "job.yaml"
    launcher = KubeflowLauncher("digits", str(path), ("image=digits:1",))
    plan = launcher.plan(LaunchRequest(local_size=4, num_nodes=2))
    assert plan.command == ("python", "train.py", "--epochs", "3")
    assert not path.exists(), "a plan writes nothing"
    with pytest.raises(SystemExit) as ended:
        launcher.launch(print, plan)
    assert ended.value.code == 0
    text = path.read_text()
    assert "numNodes: 2" in text
    assert "numProcPerNode: 4" in text
    assert f"kubectl create -f {path}" in capsys.readouterr().err
