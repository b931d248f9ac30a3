"""On a real SLURM: who is a rank, DDP over nodes, launching, cancelling, requeueing."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WHO = (sys.executable, str(HERE / "whoami.py"))
SENT = (sys.executable, str(HERE / "sent.py"))
TRAIN = (sys.executable, str(HERE.parent / "scripts" / "train.py"))
EQUAL = (sys.executable, str(HERE / "ddp_equal.py"))


def test_tasks_of_a_step_are_ranks_that_meet_at_the_first_node(slurm, values):
    told = values(slurm("srun", "-N2", "--ntasks-per-node=2", *WHO).stdout)
    worlds = sorted((each["world"] for each in told), key=lambda world: world["rank"])
    assert [
        (w["rank"], w["size"], w["local_rank"], w["local_size"], w["node_rank"]) for w in worlds
    ] == [(0, 4, 0, 2, 0), (1, 4, 1, 2, 0), (2, 4, 0, 2, 1), (3, 4, 1, 2, 1)]
    assert {w["address"] for w in worlds} == {"node1"}
    assert len({w["port"] for w in worlds}) == 1
    assert {each["host"] for each in told} == {"node1", "node2"}
    assert {each["environment"] for each in told} == {"slurm"}


def test_four_tasks_on_two_nodes_train_as_one_process_does(slurm, values, alone):
    said = slurm("srun", "-N2", "--ntasks-per-node=2", "--mem-per-cpu=0", *EQUAL)
    (found,) = values(said.stdout)
    assert (found["size"], found["environment"]) == (4, "slurm")
    for ours, theirs in zip(found["weights"], alone, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))


@pytest.mark.slow
def test_a_contradiction_is_an_error_in_every_task_and_nobody_waits(slurm):
    settings = json.dumps({"devices": 2, "num_nodes": 3})
    done = slurm("srun", "-N1", "-n2", "--mem-per-cpu=0", *EQUAL, settings, good=False)
    assert done.returncode
    assert "makes 6 processes, and slurm started 2" in done.stderr


def test_a_batch_script_without_srun_is_a_run_of_its_own_and_is_told(slurm, values):
    script = slurm.folder / "batch.sh"
    script.write_text(f"#!/bin/sh\nexec {' '.join(WHO)}\n")
    slurm.batch("-N2", "--ntasks-per-node=2", "--output=batch.txt", str(script))
    (told,) = values((slurm.folder / "batch.txt").read_text())
    assert told["world"] is None
    assert "Start the program with srun" in told["remarks"][0]


def test_an_allocation_without_srun_is_a_run_of_its_own_and_is_told(slurm, values):
    (told,) = values(slurm("salloc", "-N2", "-n2", *WHO).stdout)
    assert told["world"] is None
    assert "Start the program with srun" in told["remarks"][0]


def test_an_interactive_shell_is_a_run_of_its_own(slurm, values):
    slurm.in_a_terminal("srun", "--pty", "sh", "-c", f"{' '.join(WHO)} > shell.txt")
    (told,) = values((slurm.folder / "shell.txt").read_text())
    assert told["world"] is None
    assert told["remarks"] == []


def test_tasks_of_an_array_are_named_by_the_array_and_meet_at_ports_of_their_own(slurm, values):
    script = slurm.folder / "array.sh"
    script.write_text(f"#!/bin/sh\nexec srun {' '.join(WHO)}\n")
    array = slurm.batch("--array=0-1", "-n2", "--output=array-%a.txt", str(script))
    texts = [(slurm.folder / f"array-{task}.txt").read_text() for task in range(2)]
    told = [values(text) for text in texts]
    assert [{each["world"]["job"] for each in task} for task in told] == [
        {f"{array}_0"},
        {f"{array}_1"},
    ]
    assert len({each["world"]["port"] for task in told for each in task}) == 2


def test_a_heterogeneous_job_is_one_world(slurm, values):
    script = slurm.folder / "het.sh"
    script.write_text(f"#!/bin/sh\nexec srun --het-group=0,1 {' '.join(WHO)}\n")
    slurm.batch("--output=het.txt", "-N1", "-n1", ":", "-N1", "-n2", str(script))
    told = values((slurm.folder / "het.txt").read_text())
    worlds = sorted((each["world"] for each in told), key=lambda world: world["rank"])
    assert [(w["rank"], w["size"], w["local_size"], w["node_rank"]) for w in worlds] == [
        (0, 3, 1, 0),
        (1, 3, 2, 1),
        (2, 3, 2, 1),
    ]


def test_gpus_per_task_are_seen_by_their_task_alone(slurm, values):
    for option, apart in (("--gpus-per-task=1", True), ("--gpus-per-node=2", False)):
        told = values(slurm("srun", "-N1", "-n2", option, *WHO).stdout)
        assert [each["world"]["devices_apart"] for each in told] == [apart, apart]


@pytest.mark.parametrize("settings", [{}, pytest.param({"batch": True}, marks=pytest.mark.slow)])
def test_the_launcher_submits_itself_and_brings_the_result_back(slurm, values, settings):
    name = "SlurmLauncher"
    said = slurm(*SENT, name, json.dumps(settings), "2")
    assert values(said.stdout) == [[4, 2, "slurm", "node1"]]
    assert {f"rank {rank} of 4 on node{1 + rank // 2}" for rank in range(4)} <= set(
        said.stdout.splitlines()
    )


def test_a_failure_comes_back_from_a_node(slurm):
    done = slurm(*SENT, "SlurmLauncher", "{}", "2", "fail", good=False)
    assert done.returncode == 1
    assert "rank 3 on 'node2' raised ValueError: bad luck" in done.stderr


@pytest.mark.slow
def test_a_second_fit_works_after_srun(slurm, run, tmp_path, values):
    twice = str(HERE.parent / "scripts" / "twice.py")
    said = slurm(sys.executable, twice, "slurm")
    expected = run([sys.executable, twice, "script"], tmp_path)
    assert values(said.stdout) == values(expected.stdout)


def test_submit_writes_a_job_that_slurm_runs(slurm, values, until):
    words = ("--name=who", "--nodes=2", "--processes=2", "--go", "--", *WHO)
    slurm(sys.executable, "-m", "drivetrain", "submit", "slurm", *words)

    def logged():
        return "".join(log.read_text() for log in slurm.folder.glob("who-*.out"))

    until(lambda: len(values(logged())) == 4, "what four tasks say")


def _job(slurm, name, action="requeue"):
    """A script with two tasks on two nodes that train for a while, and its folder."""
    folder = slurm.folder / name
    folder.mkdir()
    script = folder / "job.sh"
    train = f"{sys.executable} {HERE / 'requeued.py'} {folder} {action}"
    script.write_text(f"#!/bin/sh\nexec srun {train}\n")
    options = ("-N2", "--ntasks-per-node=1", "--mem-per-cpu=0", "--requeue", "--open-mode=append")
    return folder, (*options, f"--output={folder}/log.txt", str(script))


def _losses(folder):
    """The loss of each step; of one that was done twice, the later."""
    path = folder / "losses.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split() for line in lines)


@pytest.mark.slow
def test_a_job_that_is_requeued_by_a_signal_goes_on_with_the_same_losses(slurm, until):
    whole, words = _job(slurm, "whole")
    slurm.batch(*words)
    broken, words = _job(slurm, "broken")
    job = slurm("sbatch", "--parsable", *words).stdout.strip()
    until(lambda: len(_losses(broken)) >= 4, "four steps", 250)
    slurm("scancel", "--signal=USR1", job)
    until((broken / "ends.txt").exists, "the end of the first part", 60)
    until(lambda: slurm.states(job) == ["COMPLETED"], "the end of the second part", 250)
    assert "Restarts=1" in slurm("scontrol", "show", "job", job).stdout
    ends = (broken / "ends.txt").read_text().split()
    assert ends[0] != "None"
    assert ends[-1] == "None"
    assert _losses(broken) == _losses(whole)
    lines = (broken / "losses.txt").read_text().splitlines()
    assert len(lines) == len(_losses(whole)), "no step was done twice"


@pytest.mark.slow
def test_a_job_that_is_cancelled_saves_and_tears_down(slurm, until):
    folder, words = _job(slurm, "cancelled")
    job = slurm("sbatch", "--parsable", *words).stdout.strip()
    until(lambda: len(_losses(folder)) >= 2, "two steps", 250)
    slurm("scancel", job)
    until((folder / "ends.txt").exists, "the end", 60)
    until(lambda: slurm.states(job) == ["CANCELLED"], "the job to be cancelled", 60)
    assert (folder / "ends.txt").read_text().strip() != "None"
    assert list((folder / "kept").iterdir()), "it has saved"


@pytest.mark.slow
def test_a_warning_signal_to_srun_is_one_for_its_tasks(slurm, until):
    """Not SIGTERM, for which srun kills its tasks."""
    folder = slurm.folder / "srun"
    folder.mkdir()
    train = (sys.executable, str(HERE / "requeued.py"), str(folder), "save")
    step = slurm.start("srun", "-N2", "--ntasks-per-node=1", "--mem-per-cpu=0", *train)
    try:
        until(lambda: len(_losses(folder)) >= 2, "two steps", 250)
        step.send_signal(signal.SIGUSR1)
        said, _ = step.communicate(timeout=100)
    finally:
        step.kill()
        step.wait()
    assert step.returncode == 128 + signal.SIGUSR1, said
    assert (folder / "ends.txt").read_text().strip() != "None"
    assert list((folder / "kept").iterdir()), "it has saved"


@pytest.mark.slow
def test_tasks_of_submitit_are_ranks(slurm, values, alone):
    pytest.importorskip("submitit", reason="submitit is not installed: nox -s engines")
    said = slurm(sys.executable, str(HERE / "submitted.py"), str(slurm.folder / "submitit"))
    (found,) = values(said.stdout)
    assert (found["size"], found["environment"]) == (4, "slurm")
    for ours, theirs in zip(found["weights"], alone, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))
