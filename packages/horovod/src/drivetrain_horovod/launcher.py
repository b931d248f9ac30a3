"""The launcher ``horovod``: ranks that ``horovod.run`` starts, here or on hosts that it is told."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ClusterError, LaunchPlan, NotFoundError
from drivetrain_toolkit.launchers.fresh import TASK
from drivetrain_toolkit.launchers.managed import ManagedLauncher
from drivetrain_toolkit.launchers.pickles import need_cloudpickle
from drivetrain_toolkit.launchers.plans import describe, refuse_inside_a_rank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain_interfaces import LaunchRequest

_MODULE = "drivetrain_horovod.launcher"
_MARK = "horovod"


class HorovodLauncher(ManagedLauncher):
    """Has ``horovod.run`` start the ranks over gloo.

    Args:
        settings: Further arguments of ``horovod.run``, such as ``{"hosts": "one:4,two:4"}``.
        folder: A folder that every machine sees, for what goes in and comes out.
    """

    name = "horovod"
    program = "horovodrun"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, folder: str | None = None
    ) -> None:
        super().__init__((), folder)
        self.settings = dict(settings or {})

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The command. It lists no worlds: Horovod decides who runs where.

        Raises:
            ClusterError: Several machines without their names, or this process is a rank already.
            NotFoundError: Horovod or cloudpickle is not installed.
        """
        if request.local_size < 1 or request.num_nodes < 1:
            raise ClusterError(
                f"The 'horovod' launcher was asked for {describe(request)}.",
                "Ask for at least one process and one machine.",
            )
        if request.num_nodes > 1 and not self.settings.keys() & {"hosts", "hostfile"}:
            raise ClusterError(
                f"The 'horovod' launcher was asked for {describe(request)}, and not told which.",
                "Name them: HorovodLauncher({'hosts': 'one:4,two:4'}).",
            )
        refuse_inside_a_rank(self.name)
        need_cloudpickle(self.name)
        from importlib.util import find_spec

        if find_spec("horovod") is None:
            raise NotFoundError(
                "The 'horovod' launcher was asked for, and Horovod is not installed.",
                "Build it as docs/backends/horovod.md says, or choose another launcher.",
            )
        self._size = request.local_size * request.num_nodes
        self._several_machines = request.num_nodes > 1
        settings = json.dumps({"np": self._size, "use_gloo": True, **self.settings})
        return LaunchPlan(self.name, (), (sys.executable, "-m", _MODULE, settings))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1"}


def launcher() -> HorovodLauncher:
    """What the entry point names."""
    return HorovodLauncher()


def _rank(folder: str) -> None:
    """One rank, in a process of Horovod's."""
    from drivetrain_toolkit.launchers.worker import main

    main([f"--managed={_MARK}", folder])


def main(arguments: Sequence[str]) -> None:
    """``SETTINGS FOLDER``: have ``horovod.run`` start ranks, and wait for them."""
    import horovod

    settings, folder = arguments
    sys.path[:] = pickle.loads(Path(folder, TASK).read_bytes())["path"]  # noqa: S301 - ours
    try:
        horovod.run(_rank, (folder,), **json.loads(settings))
    except RuntimeError as error:  # a rank failed, and has written down how
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    from drivetrain_horovod.launcher import main as run

    run(sys.argv[1:])
