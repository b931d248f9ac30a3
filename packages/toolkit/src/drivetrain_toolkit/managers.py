"""Batch schedulers that can be asked to run this job again. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_toolkit.environments import facts

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class SlurmManager:
    """A Slurm job, or one task of a job array: ``scontrol requeue``."""

    name: str = "slurm"

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The number of the job, and its place in an array."""
        if not env.get("SLURM_JOB_ID"):
            return ()
        return facts(env, ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))

    def requeue(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """``scontrol requeue JOB``. The last task of an array has the number of the array."""
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else env["SLURM_JOB_ID"]
        return ("scontrol", "requeue", job)


@dataclass(frozen=True, slots=True)
class LsfManager:
    """An LSF job, or one element of an array: ``brequeue``."""

    name: str = "lsf"

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The number of the job, and its place in an array."""
        return facts(env, ("LSB_JOBID", "LSB_JOBINDEX")) if env.get("LSB_JOBID") else ()

    def requeue(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """``brequeue JOB``. The index is 0 outside an array."""
        index = env.get("LSB_JOBINDEX", "0")
        job = env["LSB_JOBID"]
        return ("brequeue", job if index in {"", "0"} else f"{job}[{index}]")


SLURM: Final = SlurmManager()
LSF: Final = LsfManager()
