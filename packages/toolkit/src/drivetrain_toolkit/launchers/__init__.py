"""Starting processes. Importing this package imports no torch.

The functions here are what the entry points of the group ``drivetrain.launchers`` name. Rules:
docs/contracts/launcher.md.
"""

from __future__ import annotations

from drivetrain_toolkit.launchers.attaching import AttachLauncher
from drivetrain_toolkit.launchers.forking import ForkLauncher, ForkServerLauncher, SpawnLauncher
from drivetrain_toolkit.launchers.fresh import NotebookLauncher
from drivetrain_toolkit.launchers.managed import MPILauncher, SlurmLauncher
from drivetrain_toolkit.launchers.manifests import KubeflowLauncher
from drivetrain_toolkit.launchers.rays import RayLauncher
from drivetrain_toolkit.launchers.scripts import ScriptLauncher

__all__ = [
    "AttachLauncher",
    "ForkLauncher",
    "ForkServerLauncher",
    "KubeflowLauncher",
    "MPILauncher",
    "NotebookLauncher",
    "RayLauncher",
    "ScriptLauncher",
    "SlurmLauncher",
    "SpawnLauncher",
    "attach",
    "fork",
    "forkserver",
    "kubeflow",
    "mpi",
    "notebook",
    "ray",
    "script",
    "slurm",
    "spawn",
]


def attach() -> AttachLauncher:
    """A launcher for ranks that were started already."""
    return AttachLauncher()


def fork() -> ForkLauncher:
    """A launcher that forks this process."""
    return ForkLauncher()


def forkserver() -> ForkServerLauncher:
    """A launcher that forks a server which has imported torch and holds no threads."""
    return ForkServerLauncher()


def kubeflow() -> KubeflowLauncher:
    """A launcher that writes the manifest of a TrainJob, which runs this script."""
    return KubeflowLauncher()


def mpi() -> MPILauncher:
    """A launcher that has mpirun start the ranks."""
    return MPILauncher()


def notebook() -> NotebookLauncher:
    """A launcher that sends the function from a notebook to fresh processes."""
    return NotebookLauncher()


def ray() -> RayLauncher:
    """A launcher whose ranks are actors of a Ray cluster that runs already."""
    return RayLauncher()


def script() -> ScriptLauncher:
    """A launcher that runs this script again for each further rank."""
    return ScriptLauncher()


def slurm() -> SlurmLauncher:
    """A launcher that has srun start the ranks, in this job or in a new one."""
    return SlurmLauncher()


def spawn() -> SpawnLauncher:
    """A launcher that starts fresh interpreters."""
    return SpawnLauncher()
