"""Ranks that somebody else started: torchrun, a cluster's manager, or the script launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.errors import ClusterError
from drivetrain_interfaces.launcher import LaunchPlan

from drivetrain_toolkit.launchers.plans import check_fits, describe, world_here
from drivetrain_toolkit.launchers.scripts import run_in_this_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces.launcher import LaunchRequest


class AttachLauncher:
    """Starts nothing: this process is a rank, and ``main`` runs in it.

    Args:
        world: The place of this process; None reads it from the environment when planning.
    """

    name = "attach"

    def __init__(self, world: World | None = None) -> None:
        self._world = world

    @property
    def interactive(self) -> bool:
        """True: nothing is run again."""
        return True

    @property
    def in_place(self) -> bool:
        """True: objects keep their state."""
        return True

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """One world: that of this process.

        Raises:
            ClusterError: The request is for another number of processes than were started.
        """
        world = self._world or world_here()
        if world is None:
            if (request.local_size, request.num_nodes) != (1, 1):
                raise ClusterError(
                    f"The 'attach' launcher was asked for {describe(request)}, and nobody started "
                    "this process as one of several.",
                    "Start the script with torchrun, or choose launcher='script'.",
                )
            world = World()
        check_fits(request, world)
        return LaunchPlan(self.name, (world,))

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Call ``main`` with the plan's world and return its result. Its errors pass through.

        Raises:
            ProcessFailedError: Under the script launcher: another rank failed first.
        """
        (world,) = plan.worlds
        return run_in_this_process(main, world)
