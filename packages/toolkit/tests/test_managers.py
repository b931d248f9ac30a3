"""The commands that make a batch job run again, from the variables of real jobs."""

from __future__ import annotations

from drivetrain_interfaces import JobManager
from drivetrain_interfaces.discovery import MANAGERS, load

from drivetrain_toolkit.managers import LSF, SLURM


def test_both_are_registered() -> None:
    for name in ("slurm", "lsf"):
        assert load(MANAGERS, name, JobManager, what="job manager").name == name


def test_nothing_is_detected_outside_a_job() -> None:
    assert SLURM.detect({"SLURM_CONF": "/etc/slurm.conf"}) == ()
    assert LSF.detect({"LSF_ENVDIR": "/etc"}) == ()


def test_a_slurm_job_is_requeued_by_its_number() -> None:
    env = {"SLURM_JOB_ID": "7"}
    assert SLURM.detect(env) == ("SLURM_JOB_ID=7",)
    assert SLURM.requeue(env) == ("scontrol", "requeue", "7")


def test_a_task_of_a_slurm_array_is_requeued_alone() -> None:
    """Its last task has the array's own number, which would stand for all of them."""
    env = {"SLURM_JOB_ID": "6", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    assert SLURM.requeue(env) == ("scontrol", "requeue", "6_2")


def test_an_lsf_job_and_an_element_of_an_array_are_requeued() -> None:
    assert LSF.requeue({"LSB_JOBID": "12", "LSB_JOBINDEX": "0"}) == ("brequeue", "12")
    assert LSF.requeue({"LSB_JOBID": "12", "LSB_JOBINDEX": "3"}) == ("brequeue", "12[3]")
