"""What runs in a fresh process: ``python -m drivetrain_toolkit.launchers.worker``."""

from __future__ import annotations

import io
import os
import pickle
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.errors import ClusterError

from drivetrain_toolkit.environments import LOCAL, find_environment
from drivetrain_toolkit.failures import DIRECTORY, RunDirectory, is_stop, reported
from drivetrain_toolkit.launchers.forking import ChildPlace, run_child
from drivetrain_toolkit.launchers.fresh import TASK
from drivetrain_toolkit.launchers.managed import RESULT
from drivetrain_toolkit.launchers.pickles import pickled_result, unpickled
from drivetrain_toolkit.launchers.plans import place
from drivetrain_toolkit.processes import PARENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MANAGED = "--managed="


def main(arguments: Sequence[str]) -> None:
    """Be a rank: ``FOLDER [PIPE]`` as a child, ``--managed=LAUNCHER FOLDER`` under a manager."""
    for stream in (sys.stdout, sys.stderr):
        # Into a pipe Python writes blocks, or unbuffered the pieces of a line: lines are wanted.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)
    launcher = arguments[0].removeprefix(_MANAGED) if arguments[0].startswith(_MANAGED) else ""
    folder, *pipe = arguments[1:] if launcher else arguments
    content = pickle.loads(Path(folder, TASK).read_bytes())  # noqa: S301 - from our own parent
    sys.path[:] = content["path"]
    if launcher:
        _run_managed(launcher, RunDirectory(folder), content)
        return
    variables = {name: os.environ[name] for name in (DIRECTORY, PARENT)}
    run_child(
        content["task"],
        ChildPlace(LOCAL.world(os.environ), variables, by_value=True),
        Connection(int(pipe[0]), readable=False) if pipe else None,
        {},
    )


def _run_managed(launcher: str, directory: RunDirectory, content: Mapping[str, Any]) -> None:
    environment = find_environment(os.environ)
    world = environment.world(os.environ) if environment else World()

    def call(world: World) -> None:
        if world.size != content["size"]:
            raise ClusterError(
                f"The {launcher!r} launcher asked for {content['size']} processes, and "
                f"{world.size} were started ({', '.join(world.evidence) or 'no variables'}).",
                "Remove options that change the number of processes.",
            )
        os.environ.update(place(world, launcher))
        result = unpickled(content["task"], "main")(world)
        if world.is_main:
            draft = Path(directory.path, f"{RESULT}.draft")
            draft.write_bytes(pickled_result(result, by_value=True))
            draft.replace(draft.with_suffix(""))

    try:
        reported(call, world, directory)
    except BaseException as error:  # noqa: BLE001 - reported, and the exit code says the rest
        sys.stdout.flush()
        code = getattr(error, "code", 130) if is_stop(error) else 1
        raise SystemExit(code) from None


if __name__ == "__main__":
    main(sys.argv[1:])
