"""Launchers whose processes choose a module each, and whose parent opens none."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces import ClusterError
from drivetrain_toolkit.launchers import (
    ForkLauncher,
    ForkServerLauncher,
    NotebookLauncher,
    ScriptLauncher,
    SpawnLauncher,
)

from drivetrain_hpu.bridge import is_loaded, is_open
from drivetrain_hpu.modules import MODULE, STALE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces import LaunchPlan, LaunchRequest, World


class _OneModuleEach:
    """Around a launcher: what a child must not inherit is removed before there are children."""

    name: str

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The ranks of this machine.

        Raises:
            ClusterError: The request cannot be met, or this process holds a device.
        """
        if request.local_size > 1:
            _refuse_open_device(self.name, request.local_size)
        plan: LaunchPlan = super().plan(request)  # type: ignore[misc]
        return plan

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Run ``main`` in every process; errors are those of the launcher of that name."""
        if len(plan.worlds) > 1:
            _refuse_open_device(self.name, len(plan.worlds))
            _forget_stale()
        return super().launch(main, plan)  # type: ignore[misc]


class HpuScriptLauncher(_OneModuleEach, ScriptLauncher):
    """The script launcher. Rank 0 is the process of the script, and opens its device later."""


class HpuSpawnLauncher(_OneModuleEach, SpawnLauncher):
    """Fresh interpreters."""


class HpuForkServerLauncher(_OneModuleEach, ForkServerLauncher):
    """Forks of a server that has imported torch, and not the bridge."""


class HpuNotebookLauncher(_OneModuleEach, NotebookLauncher):
    """Fresh processes for a notebook."""


class HpuForkLauncher(_OneModuleEach, ForkLauncher):
    """Forks of this process, as long as it has not loaded the bridge."""

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The ranks of this machine. Raises ``ClusterError`` once the bridge is loaded."""
        if is_loaded():
            raise ClusterError(
                "The 'fork' launcher was asked for, and this process has loaded the Gaudi bridge, "
                "whose threads survive no fork.",
                "Use launcher='spawn' or 'notebook', which start fresh processes.",
            )
        return super().plan(request)


LAUNCHERS: Final[Mapping[str, type[_OneModuleEach]]] = {
    "script": HpuScriptLauncher,
    "spawn": HpuSpawnLauncher,
    "fork": HpuForkLauncher,
    "forkserver": HpuForkServerLauncher,
    "notebook": HpuNotebookLauncher,
}


def _refuse_open_device(name: str, size: int) -> None:
    if is_open():
        raise ClusterError(
            f"The {name!r} launcher was to start {size} processes, and this process has opened a "
            "Gaudi device already, which it keeps to its end.",
            "Use no hpu tensor before the run, or start the ranks with torchrun.",
        )


def _forget_stale() -> None:
    """Drop what names one module for one process: children would all open that one."""
    found = {name: os.environ.pop(name) for name in STALE if name in os.environ}
    if MODULE in found:
        warnings.warn(
            f"{MODULE}={found[MODULE]} is set, and is dropped: each of several processes opens a "
            "module of its own. Use HABANA_VISIBLE_MODULES to say which.",
            stacklevel=4,
        )
