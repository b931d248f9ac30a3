"""Starting a script in several processes by ``poprun``, which comes with the SDK."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ClusterError, LaunchPlan, ProcessFailedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces import LaunchRequest, World


class PoprunLauncher:
    """Runs this script again under ``poprun``, once for each instance.

    The replicas of all instances train one model; ``devices=`` is then the number of replicas of
    one. It is called by a script that starts another one: a trainer in what ``poprun`` started
    attaches by itself, and needs no launcher.

    Args:
        instances: Processes, in all.
        ipus_per_replica: IPUs of one copy of the model.
        options: Further options of ``poprun``, such as ``{"vipu-partition": "mine"}``;
            True stands for an option without a value.

    Raises:
        ClusterError: A number is not positive.
    """

    interactive = False

    def __init__(
        self,
        instances: int = 0,
        ipus_per_replica: int = 1,
        options: Mapping[str, str | bool] | None = None,
    ) -> None:
        if instances < 0 or ipus_per_replica < 1:
            raise ClusterError(
                f"PoprunLauncher(instances={instances!r}, ipus_per_replica={ipus_per_replica!r}) "
                "was asked for.",
                "Give positive numbers.",
            )
        self._instances = instances
        self._ipus = ipus_per_replica
        self._options = dict(options or {})

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The command that ``launch`` runs. Raises ``ClusterError`` without a script."""
        script = sys.argv[0]
        if not os.path.isfile(script):
            raise ClusterError(
                f"poprun was asked for, and there is no script to run again ({script!r}).",
                "Run a file, or start it with poprun yourself.",
            )
        instances = self._instances or max(request.num_nodes, 1)
        words = [
            "poprun",
            f"--num-instances={instances}",
            f"--num-replicas={instances * request.local_size}",
            f"--ipus-per-replica={self._ipus}",
        ]
        for name, value in sorted(self._options.items()):
            words += [f"--{name}" if value is True else f"--{name}={value}"] if value else []
        return LaunchPlan("poprun", (), (*words, sys.executable, script, *sys.argv[1:]))

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Run the command and wait for it. Returns None: results stay in its processes.

        Raises:
            UnavailableError: There is no ``poprun``.
            ProcessFailedError: It ended with an error.
        """
        program = shutil.which(plan.command[0])
        if program is None:
            raise UnavailableError(
                "poprun was asked for, and no program of that name is on the PATH.",
                "Activate the Poplar SDK (source its enable script).",
            )
        done = subprocess.run([program, *plan.command[1:]], check=False)  # noqa: S603 - the user's own script
        if done.returncode:
            raise ProcessFailedError(
                f"poprun ended with exit code {done.returncode}.",
                "Look for the first error in its output.",
            )
        return None
