"""Tasks of a SLURM job step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_toolkit.environments.hosts import expand_counts, first_host, port_of
from drivetrain_toolkit.environments.reading import ADDRESS, LOOPBACK, Place, Reading, facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces.cluster import World

# Steps from here on are no steps of the user's: a batch script, a shell on a node, and the like.
_SPECIAL_STEPS: Final = 0xFFFF_FF00
_STEP: Final = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
_TASK: Final = (
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_RESV_PORTS",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
)
_PER_TASK: Final = ("gpu:per_task", "gpu:single", "gres/gpu:per_task", "gres/gpu:single")


@dataclass(frozen=True, slots=True)
class SLURMEnvironment:
    """Tasks that ``srun`` started: a job step with more than one of them.

    A batch script, ``salloc`` and ``srun --pty`` make no ranks: a process there is one of its own,
    however many nodes the job has. The name of the job proves nothing.
    """

    name: str = "slurm"
    priority: int = 70

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """Job, step, task and the number of tasks; empty outside a step of several tasks."""
        step = env.get("SLURM_STEP_ID", "")
        if not step or not env.get("SLURM_PROCID", "") or not env.get("SLURM_JOB_ID", ""):
            return ()
        if step.isdigit() and int(step) >= _SPECIAL_STEPS:
            return ()
        tasks = env.get("SLURM_STEP_NUM_TASKS", "") or env.get("SLURM_NTASKS", "")
        if tasks in {"", "0", "1"}:
            return ()
        return facts(env, (*_STEP, "SLURM_NTASKS"))

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this task.

        Rank 0 is met at ``MASTER_ADDR`` and ``MASTER_PORT`` where the user has set them, else at
        the first host of the step, at a port that ``srun --resv-ports`` reserved, or at one that
        follows from the numbers of job and step.

        Raises:
            ClusterError: Variables are missing or contradict each other.
        """
        reading = Reading(self.name, env, facts(env, (*_STEP, *_TASK, *ADDRESS)))
        if not self.detect(env):
            raise reading.error(
                "this process is no task of a step with several tasks",
                "Start the program with srun, and with more than one task.",
            )
        counts = self._counts(reading)
        place = self._place(reading, counts)
        reading.agree(place)
        alone = len(counts) == 1
        return reading.world(
            place,
            self._address(reading, alone=alone),
            self._port(reading),
            num_nodes=len(counts),
            restarts=reading.number("SLURM_RESTART_COUNT", default=0),
            job=job_name(env),
            devices_apart=_devices_apart(env),
        )

    def remarks(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """That this process has a job of several tasks or nodes to itself, where it has."""
        job = env.get("SLURM_JOB_ID", "")
        if not job or self.detect(env) or _is_only_task(env):
            return ()
        found = facts(env, ("SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SLURM_NNODES"))
        several = (env.get(name, "1") not in {"", "1"} for name in ("SLURM_NTASKS", "SLURM_NNODES"))
        if not any(several):
            return ()
        remark = (
            f"SLURM job {job} is larger than this process ({', '.join(found)}), and srun did not "
            "start it: nobody else is waited for. Start the program with srun to use all of the "
            "job."
        )
        return (remark,)

    def _counts(self, reading: Reading) -> tuple[int, ...]:
        """Tasks on each node of the step."""
        text = reading.text("SLURM_STEP_TASKS_PER_NODE")
        try:
            return expand_counts(text)
        except ValueError as error:
            raise reading.error(
                f"SLURM_STEP_TASKS_PER_NODE={text} cannot be read: {error}",
                "Unset it where it was set by hand.",
            ) from error

    def _place(self, reading: Reading, counts: tuple[int, ...]) -> Place:
        name = "SLURM_STEP_NUM_TASKS" if reading.env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        size = reading.number(name, least=1)
        rank, local = reading.number("SLURM_PROCID"), reading.number("SLURM_LOCALID")
        node = reading.number("SLURM_NODEID")
        if sum(counts) != size:
            raise reading.contradiction(
                f"{name}={size}, and SLURM_STEP_TASKS_PER_NODE counts {sum(counts)}"
            )
        if rank >= size:
            raise reading.contradiction(f"SLURM_PROCID={rank} is outside {name}={size}")
        if node >= len(counts):
            raise reading.contradiction(
                f"SLURM_NODEID={node} is outside SLURM_STEP_TASKS_PER_NODE, which has "
                f"{len(counts)} nodes"
            )
        if local >= counts[node]:
            raise reading.contradiction(
                f"SLURM_LOCALID={local} is outside the {counts[node]} tasks of node {node}"
            )
        return Place(rank, size, local, counts[node], node)

    def _address(self, reading: Reading, *, alone: bool) -> str:
        if reading.env.get("MASTER_ADDR", ""):
            return reading.address()
        if alone:
            return LOOPBACK
        text = reading.text("SLURM_STEP_NODELIST")
        try:
            return first_host(text)
        except ValueError as error:
            raise reading.error(
                f"SLURM_STEP_NODELIST={text} cannot be read: {error}",
                "Set MASTER_ADDR to the host of task 0.",
            ) from error

    def _port(self, reading: Reading) -> int:
        if reading.env.get("MASTER_PORT", ""):
            return reading.port()
        reserved = reading.env.get("SLURM_STEP_RESV_PORTS", "")
        first = reserved.partition(",")[0].partition("-")[0]
        if first.isdigit():
            return int(first)
        job, step = reading.number("SLURM_JOB_ID"), reading.number("SLURM_STEP_ID")
        return port_of(job, step, reading.number("SLURM_RESTART_COUNT", default=0))


def job_name(env: Mapping[str, str]) -> str:
    """The job as ``scontrol`` and ``scancel`` take it: ``7``, or ``6_2`` for an array's task.

    The job number alone is no name for a task of an array: each task has its own, and the last one
    has that of the array.
    """
    array, task = env.get("SLURM_ARRAY_JOB_ID", ""), env.get("SLURM_ARRAY_TASK_ID", "")
    return f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID", "")


def _is_only_task(env: Mapping[str, str]) -> bool:
    """Whether this is a step of one task, as asked for: ``srun -n1``, ``srun --pty``."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _SPECIAL_STEPS


def _devices_apart(env: Mapping[str, str]) -> bool:
    """Whether each task sees only the devices that it got for itself."""
    bound = env.get("SLURMD_TRES_BIND", "") or env.get("SLURM_TRES_BIND", "")
    return bound.startswith(_PER_TASK) or bool(env.get("SLURM_GPUS_PER_TASK", ""))


SLURM: Final = SLURMEnvironment()
