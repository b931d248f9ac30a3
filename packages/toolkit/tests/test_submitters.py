"""Job files are what a person would have written; real models check the manifest of a TrainJob."""

from __future__ import annotations

import json
import subprocess

import pytest
from drivetrain_interfaces import ConfigurationError, JobRequest, Submitter
from drivetrain_interfaces.discovery import SUBMITTERS, registrations

from drivetrain_toolkit.submitters import KUBEFLOW, LSF, RAY, SLURM, to_yaml

COMMAND = ("python", "train.py", "--name", "a b")
JOB = JobRequest(
    COMMAND,
    name="digits",
    nodes=2,
    processes=4,
    devices=4,
    cpus=8,
    time="01:30:00",
    setup=("module load python",),
    options=("--partition=gpu",),
)


def test_each_is_registered_and_satisfies_the_contract() -> None:
    claims = registrations(SUBMITTERS)
    assert {"kubeflow", "lsf", "ray", "slurm"} <= set(claims)
    for (claim,) in claims.values():
        assert isinstance(claim.load(), Submitter)


def test_the_script_for_slurm() -> None:
    assert (
        SLURM.write(JOB).text
        == """\
#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=01:30:00
#SBATCH --output=digits-%j.out
#SBATCH --open-mode=append
#SBATCH --partition=gpu

set -euo pipefail
module load python
srun --kill-on-bad-exit=1 --cpus-per-task=8 python train.py --name 'a b'
"""
    )
    assert SLURM.command("digits.sh") == ("sbatch", "digits.sh")


def test_the_script_for_lsf() -> None:
    assert (
        LSF.write(JOB).text
        == """\
#!/bin/bash
#BSUB -J digits
#BSUB -nnodes 2
#BSUB -W 1:30
#BSUB -o digits-%J.out
#BSUB --partition=gpu

set -euo pipefail
module load python
jsrun -n 2 -r 1 -a 4 -c 32 -g 4 python train.py --name 'a b'
"""
    )
    assert LSF.command("a b.lsf") == ("sh", "-c", "bsub < 'a b.lsf'")


def test_what_is_left_out_is_left_to_the_manager() -> None:
    small = JobRequest(("true",))
    for text in (SLURM.write(small).text, LSF.write(small).text):
        assert "gpus" not in text
        assert " -g" not in text
        assert "--time" not in text
        assert "-W" not in text


def test_the_script_for_ray() -> None:
    text = RAY.write(JobRequest(COMMAND, name="digits", nodes=2, processes=4)).text
    assert 'Trainer(launcher="ray", num_nodes=2, devices=4)' in text
    assert text.endswith(
        "ray job submit --submission-id=digits --working-dir=. -- python train.py --name 'a b'\n"
    )


@pytest.mark.parametrize("submitter", [SLURM, LSF, RAY])
def test_scripts_are_shell(submitter: Submitter) -> None:
    job = JobRequest(("echo", "it's", "$HOME"), nodes=2)
    text = submitter.write(job).text
    done = subprocess.run(
        ["bash", "-n"], input=text, text=True, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'$HOME'" in text, "what was quoted stays so"


TRAINJOB = JobRequest(
    COMMAND,
    name="digits",
    nodes=2,
    processes=4,
    devices=4,
    cpus=2,
    memory="16Gi",
    time="01:00:00",
    options=("image=example.com/digits:1", "device=example.com/gpu", "namespace=team"),
)


@pytest.mark.parametrize("job", [TRAINJOB, JobRequest(("python", "train.py"))])
def test_the_manifest_is_one_that_the_published_models_take(job: JobRequest) -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed"
    )
    manifest = KUBEFLOW.manifest(job)
    read = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    # Unknown fields are dropped there without a word, so a typing error shows in the comparison.
    assert json.loads(json.dumps(read.to_dict())) == manifest


def test_the_file_of_a_trainjob_says_what_the_manifest_does() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert yaml.safe_load(KUBEFLOW.write(TRAINJOB).text) == KUBEFLOW.manifest(TRAINJOB)


def test_texts_that_yaml_would_take_for_something_else_are_quoted() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    values = ["yes", "1", "1e3", "a: b", "- x", "", "null", "~", "#", "a b", "é", "0x1", "1:30", 7]
    tree = {"list": values, "empty": {"deep": {"er": "x"}}, "on": "off"}
    assert yaml.safe_load(to_yaml(tree)) == tree


@pytest.mark.parametrize(
    ("submitter", "job", "what"),
    [
        (SLURM, JobRequest(()), "without a command"),
        (SLURM, JobRequest(COMMAND, nodes=0), "nodes=0"),
        (LSF, JobRequest(COMMAND, processes=0), "processes=0"),
        (LSF, JobRequest(COMMAND, time="90"), "time='90'"),
        (RAY, JobRequest(COMMAND, time="01:00:00"), "time limit or memory"),
        (KUBEFLOW, JobRequest(COMMAND, name="My Job"), "'My Job'"),
        (KUBEFLOW, JobRequest(COMMAND, devices=1), "not which resource"),
        (KUBEFLOW, JobRequest(COMMAND, options=("imagee=x",)), "imagee"),
        (KUBEFLOW, JobRequest(COMMAND, setup=("module load x",)), "Lines of setup"),
    ],
)
def test_what_a_manager_cannot_do_is_refused(
    submitter: Submitter, job: JobRequest, what: str
) -> None:
    with pytest.raises(ConfigurationError, match=what):
        submitter.write(job)
