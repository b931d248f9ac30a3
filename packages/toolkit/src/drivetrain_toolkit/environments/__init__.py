"""Reading a process's place in the run from environment variables. Imports no torch.

One module for each kind of manager; who goes before whom is told by their ``priority``. Rules:
docs/contracts/cluster.md; the table of precedence: docs/environments.md.
"""

from __future__ import annotations

from drivetrain_toolkit.environments.finding import find_environment
from drivetrain_toolkit.environments.kubeflow import KUBEFLOW, KubeflowEnvironment
from drivetrain_toolkit.environments.local import LOCAL, LocalEnvironment
from drivetrain_toolkit.environments.lsf import LSF, LSFEnvironment
from drivetrain_toolkit.environments.mpi import MPI, MPIEnvironment
from drivetrain_toolkit.environments.reading import CLUSTER, LAUNCHED, facts
from drivetrain_toolkit.environments.slurm import SLURM, SLURMEnvironment
from drivetrain_toolkit.environments.torchrun import TORCHRUN, TorchRunEnvironment

__all__ = [
    "CLUSTER",
    "KUBEFLOW",
    "LAUNCHED",
    "LOCAL",
    "LSF",
    "MPI",
    "SLURM",
    "TORCHRUN",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LocalEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchRunEnvironment",
    "facts",
    "find_environment",
]
