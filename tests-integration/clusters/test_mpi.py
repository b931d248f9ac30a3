"""Under a real mpirun: who is a rank, DDP, launching."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@pytest.fixture(params=["open-mpi", "mpich"])
def mpirun(request, run, tmp_path):
    """The program, which is Open MPI's or MPICH's; folders of others can be put before the PATH."""
    folders = os.environ.get("TEST_MPI_PATH", "").split(os.pathsep)
    path = os.pathsep.join([*filter(None, folders), os.environ["PATH"]])
    sign = {"open-mpi": ("Open MPI", "OpenRTE", "PRTE"), "mpich": ("HYDRA", "MPICH")}[request.param]
    for folder in path.split(os.pathsep):
        program = Path(folder, "mpirun")
        if program.exists():
            said = run([str(program), "--version"], tmp_path, AS_ROOT, good=False).stdout
            if any(each in said for each in sign):
                return str(program)
    return pytest.skip(f"{request.param} is not installed: nox -s clusters as root, or engines")


def test_ranks_of_mpirun_are_ranks_here(mpirun, run, tmp_path, values):
    words = [mpirun, "-n", "2", sys.executable, str(HERE / "whoami.py")]
    told = values(run(words, tmp_path, AS_ROOT).stdout)
    worlds = sorted((each["world"] for each in told), key=lambda world: world["rank"])
    assert [(w["rank"], w["size"], w["local_rank"], w["local_size"]) for w in worlds] == [
        (0, 2, 0, 2),
        (1, 2, 1, 2),
    ]
    assert {(w["environment"], w["address"]) for w in worlds} == {("mpi", "127.0.0.1")}
    assert len({w["port"] for w in worlds}) == 1


def test_two_mpiruns_meet_at_ports_of_their_own(mpirun, run, tmp_path, values):
    words = [mpirun, "-n", "2", sys.executable, str(HERE / "whoami.py")]
    ports = {values(run(words, tmp_path, AS_ROOT).stdout)[0]["world"]["port"] for _ in range(2)}
    assert len(ports) == 2


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(mpirun, run, tmp_path, values, alone):
    words = [mpirun, "-n", "2", sys.executable, str(HERE / "ddp_equal.py")]
    (found,) = values(run(words, tmp_path, AS_ROOT).stdout)
    assert (found["size"], found["environment"]) == (2, "mpi")
    for ours, theirs in zip(found["weights"], alone, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))


def test_the_launcher_starts_mpirun_and_brings_the_result_back(mpirun, run, tmp_path, values):
    path = os.pathsep.join([str(Path(mpirun).parent), os.environ["PATH"]])
    words = [sys.executable, str(HERE / "sent.py"), "MPILauncher", "{}", "1"]
    said = run(words, tmp_path, {**AS_ROOT, "PATH": path})
    assert values(said.stdout) == [[2, 1, "mpi", "127.0.0.1"]]
    done = run([*words, "fail"], tmp_path, {**AS_ROOT, "PATH": path}, good=False)
    assert "raised ValueError: bad luck" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_mpirun_in_an_allocation_of_slurm_wins_over_slurm(slurm, values):
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is not installed")
    words = ("salloc", "-N1", "-n2", "mpirun", "-n", "2", sys.executable, str(HERE / "whoami.py"))
    told = values(slurm(*words, env=AS_ROOT).stdout)
    assert [each["environment"] for each in told] == ["mpi", "mpi"]
