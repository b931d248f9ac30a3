"""Starting processes. Importing this package imports no torch.

The functions here are what the entry points of the group ``drivetrain.launchers`` name. Rules:
docs/contracts/launcher.md.
"""

from __future__ import annotations

from drivetrain_toolkit.launchers.attaching import AttachLauncher
from drivetrain_toolkit.launchers.forking import ForkLauncher, SpawnLauncher
from drivetrain_toolkit.launchers.scripts import ScriptLauncher

__all__ = [
    "AttachLauncher",
    "ForkLauncher",
    "ScriptLauncher",
    "SpawnLauncher",
    "attach",
    "fork",
    "script",
    "spawn",
]


def attach() -> AttachLauncher:
    """A launcher for ranks that were started already."""
    return AttachLauncher()


def fork() -> ForkLauncher:
    """A launcher that forks this process."""
    return ForkLauncher()


def script() -> ScriptLauncher:
    """A launcher that runs this script again for each further rank."""
    return ScriptLauncher()


def spawn() -> SpawnLauncher:
    """A launcher that starts fresh interpreters."""
    return SpawnLauncher()
