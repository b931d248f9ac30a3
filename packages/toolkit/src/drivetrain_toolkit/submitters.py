"""Job files for SLURM, LSF, Kubeflow and Ray, as a person would write them. Imports no torch."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import ConfigurationError
from drivetrain_interfaces.submit import JobFile, JobRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TIME: Final = re.compile(r"(\d+):([0-5]\d):([0-5]\d)")
# What YAML reads as the same text without quotes.
_PLAIN: Final = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_WORDS_OF_YAML: Final = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_LABEL: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def _check(job: JobRequest) -> None:
    """Refuse what no manager can do."""
    for what, number, least in (
        ("nodes", job.nodes, 1),
        ("processes", job.processes, 1),
        ("devices", job.devices, 0),
        ("cpus", job.cpus, 0),
    ):
        if number < least:
            raise ConfigurationError(
                f"A job with {what}={number} was asked for.", f"Give at least {least}."
            )
    if not job.command:
        raise ConfigurationError(
            "A job was asked for without a command.",
            "Give what each process runs after --, such as: -- python train.py",
        )
    if job.time and not _TIME.fullmatch(job.time):
        raise ConfigurationError(
            f"A job with time={job.time!r} was asked for.", "Write it as HH:MM:SS."
        )


def _given(*options: tuple[str, Any]) -> list[str]:
    """The options that have a value: ``("--mem={}", "4G")`` is ``--mem=4G``."""
    return [option.format(value) for option, value in options if value]


def _script(head: Iterable[str], setup: Iterable[str], last: str) -> str:
    lines = ["#!/bin/bash", *head, "", "set -euo pipefail", *setup, last]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class SlurmSubmitter:
    """A script for ``sbatch`` with one ``srun``, whose tasks are the ranks."""

    name: str = "slurm"

    def write(self, job: JobRequest) -> JobFile:
        """The script. A task for each process; the log is continued when the job is requeued.

        Raises:
            ConfigurationError: A number or time that makes no job.
        """
        _check(job)
        head = _given(
            ("--job-name={}", job.name),
            ("--nodes={}", job.nodes),
            ("--ntasks-per-node={}", job.processes),
            ("--cpus-per-task={}", job.cpus),
            ("--gpus-per-node={}", job.devices),
            ("--mem={}", job.memory),
            ("--time={}", job.time),
            ("--output={}-%j.out", job.name),
        )
        head += ["--open-mode=append", *job.options]
        # srun takes over all of these but the cores of a task.
        cpus = f" --cpus-per-task={job.cpus}" if job.cpus else ""
        last = f"srun --kill-on-bad-exit=1{cpus} {shlex.join(job.command)}"
        return JobFile(_script((f"#SBATCH {each}" for each in head), job.setup, last), ".sh")

    def command(self, path: str) -> tuple[str, ...]:
        """``sbatch PATH``."""
        return ("sbatch", path)


@dataclass(frozen=True, slots=True)
class LSFSubmitter:
    """A script for ``bsub`` with one ``jsrun``, whose tasks are the ranks.

    One resource set for each machine, so that the tasks of a machine see all of its devices.
    """

    name: str = "lsf"

    def write(self, job: JobRequest) -> JobFile:
        """The script.

        Raises:
            ConfigurationError: A number or time that makes no job.
        """
        _check(job)
        head = _given(
            ("-J {}", job.name),
            ("-nnodes {}", job.nodes),
            ("-W {}", _hours_and_minutes(job.time) if job.time else ""),
            ("-M {}", job.memory),
            ("-o {}-%J.out", job.name),
        )
        head += job.options
        cpus = f" -c {job.cpus * job.processes}" if job.cpus else " -c ALL_CPUS"
        devices = f" -g {job.devices}" if job.devices else ""
        last = (
            f"jsrun -n {job.nodes} -r 1 -a {job.processes}{cpus}{devices} {shlex.join(job.command)}"
        )
        return JobFile(_script((f"#BSUB {each}" for each in head), job.setup, last), ".lsf")

    def command(self, path: str) -> tuple[str, ...]:
        """``bsub``, which reads the options in a script from its standard input only."""
        return ("sh", "-c", f"bsub < {shlex.quote(path)}")


@dataclass(frozen=True, slots=True)
class KubeflowSubmitter:
    """The manifest of a TrainJob of Kubeflow Trainer v2.

    Options are ``image=``, ``runtime=`` (``torch-distributed`` if not given), ``namespace=``, and
    ``device=`` for the resource that devices are, such as ``example.com/gpu``.
    """

    name: str = "kubeflow"

    def write(self, job: JobRequest) -> JobFile:
        """The manifest. Several processes of a pod are started by the trainer in it.

        Raises:
            ConfigurationError: An unknown option, a name that Kubernetes does not take, or what a
                manifest cannot say.
        """
        _check(job)
        return JobFile(to_yaml(self.manifest(job)), ".yaml")

    def command(self, path: str) -> tuple[str, ...]:
        """``kubectl create -f PATH``."""
        return ("kubectl", "create", "-f", path)

    def manifest(self, job: JobRequest) -> dict[str, Any]:
        """The manifest as data. Raises as ``write``."""
        options = self._options(job)
        if not _LABEL.fullmatch(job.name):
            raise ConfigurationError(
                f"A TrainJob with the name {job.name!r} was asked for.",
                "Use small letters, digits and hyphens, beginning with a letter.",
            )
        if job.setup:
            raise ConfigurationError(
                "Lines of setup were asked for, and a TrainJob runs one command in each pod.",
                "Put them into the image, or into a script that the command runs.",
            )
        limits = self._limits(job, options.get("device", ""))
        trainer: dict[str, Any] = {
            **({"image": options["image"]} if "image" in options else {}),
            "command": list(job.command),
            "numNodes": job.nodes,
            "numProcPerNode": job.processes,
            **({"resourcesPerNode": {"limits": limits}} if limits else {}),
        }
        where = {"namespace": options["namespace"]} if "namespace" in options else {}
        deadline = {"activeDeadlineSeconds": _seconds(job.time)} if job.time else {}
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.name, **where},
            "spec": {
                "runtimeRef": {"name": options.get("runtime", "torch-distributed")},
                "trainer": trainer,
                **deadline,
            },
        }

    def _options(self, job: JobRequest) -> dict[str, str]:
        known = ("image", "runtime", "namespace", "device")
        options = dict(each.partition("=")[::2] for each in job.options)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ConfigurationError(
                f"A TrainJob with the options {', '.join(unknown)} was asked for, which are not "
                f"among {', '.join(known)}.",
                "Leave them out, and edit the file that is written.",
            )
        return options

    def _limits(self, job: JobRequest, device: str) -> dict[str, Any]:
        if job.devices and not device:
            raise ConfigurationError(
                f"A TrainJob with {job.devices} devices in each pod was asked for, and not which "
                "resource of Kubernetes they are.",
                "Add --option device=RESOURCE, with the name that kubectl describe nodes shows.",
            )
        return {
            **({"cpu": job.cpus * job.processes} if job.cpus else {}),
            **({"memory": job.memory} if job.memory else {}),
            **({device: job.devices} if job.devices else {}),
        }


@dataclass(frozen=True, slots=True)
class RaySubmitter:
    """A script with ``ray job submit``. The program's own launcher makes the ranks actors."""

    name: str = "ray"

    def write(self, job: JobRequest) -> JobFile:
        """The script.

        Raises:
            ConfigurationError: A time limit or memory, which Ray's jobs do not have.
        """
        _check(job)
        if job.time or job.memory:
            raise ConfigurationError(
                "A job of Ray with a time limit or memory was asked for, and it has neither.",
                "Leave them out, or give them to the launcher: RayLauncher(resources=...).",
            )
        head = (
            f"# The program itself runs {job.nodes} × {job.processes} ranks as actors:",
            f'# Trainer(launcher="ray", num_nodes={job.nodes}, devices={job.processes})',
        )
        words = ["ray", "job", "submit", f"--submission-id={job.name}", "--working-dir=."]
        last = f"{shlex.join([*words, *job.options])} -- {shlex.join(job.command)}"
        return JobFile(_script(head, job.setup, last), ".sh")

    def command(self, path: str) -> tuple[str, ...]:
        """``bash PATH``."""
        return ("bash", path)


def _seconds(time: str) -> int:
    hours, minutes, seconds = (int(part) for part in time.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def _hours_and_minutes(time: str) -> str:
    minutes = -(-_seconds(time) // 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def to_yaml(value: Any) -> str:
    """Dicts, lists, texts and whole numbers as YAML in the usual hand."""
    return "".join(f"{line}\n" for line in _yaml_lines(value))


def _yaml_lines(value: dict[str, Any] | list[Any], indent: str = "") -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, item in items:
        start = f"{indent}-" if key is None else f"{indent}{_scalar(key)}:"
        if isinstance(item, (dict, list)):
            yield start
            yield from _yaml_lines(item, f"{indent}  ")
        else:
            yield f"{start} {_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return json.dumps(value) if value.lower() in _WORDS_OF_YAML else value
    return json.dumps(value, ensure_ascii=False)


SLURM: Final = SlurmSubmitter()
LSF: Final = LSFSubmitter()
KUBEFLOW: Final = KubeflowSubmitter()
RAY: Final = RaySubmitter()
