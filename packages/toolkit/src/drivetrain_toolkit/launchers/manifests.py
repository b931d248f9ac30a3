"""The kubeflow launcher: it writes the manifest of a TrainJob whose pods run this script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.errors import StorageError
from drivetrain_interfaces.launcher import LaunchPlan
from drivetrain_interfaces.submit import JobRequest

from drivetrain_toolkit.launchers.plans import refuse_inside_a_rank
from drivetrain_toolkit.launchers.scripts import this_script
from drivetrain_toolkit.submitters import KUBEFLOW, to_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.launcher import LaunchRequest


class KubeflowLauncher:
    """Writes what Kubeflow has to be given, and ends the program: the run happens in the pods.

    In a pod the same script finds itself described by Kubeflow, and runs. So the image must hold
    the script, at the same path.

    Args:
        name: What the job is called.
        path: The file to write.
        options: As of the submitter: ``image=``, ``runtime=``, ``namespace=``, ``device=``.
        devices: Devices of each pod; 0 for none.
    """

    name = "kubeflow"

    def __init__(
        self,
        name: str = "drivetrain",
        path: str = "trainjob.yaml",
        options: Sequence[str] = (),
        devices: int = 0,
    ) -> None:
        self._job = name
        self._path = path
        self._options = tuple(options)
        self._devices = devices
        self._text = ""

    @property
    def interactive(self) -> bool:
        """False: pods run a script."""
        return False

    @property
    def in_place(self) -> bool:
        """False: nothing runs here."""
        return False

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The command of each pod. It lists no worlds: none is on this machine.

        Raises:
            ClusterError: There is no script to run, or this process is a rank already.
            ConfigurationError: What a manifest cannot say.
        """
        refuse_inside_a_rank(self.name)
        command = ("python", *this_script().arguments[1:])
        job = JobRequest(
            command,
            name=self._job,
            nodes=request.num_nodes,
            processes=request.local_size,
            devices=self._devices,
            options=self._options,
        )
        self._text = to_yaml(KUBEFLOW.manifest(job))
        return LaunchPlan(self.name, (), command)

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Write the manifest, say how to submit it, and end the program.

        Raises:
            StorageError: The file cannot be written.
            SystemExit: Always: 0, with the file written.
        """
        try:
            Path(self._path).write_text(self._text, encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"The manifest was to be written to {self._path!r}, and that raised {error}.",
                "Choose another path: KubeflowLauncher(path=...).",
            ) from error
        submit = " ".join(KUBEFLOW.command(self._path))
        sys.stderr.write(f"{self._path} describes the run; nothing ran here. Start it: {submit}\n")
        raise SystemExit(0)
