"""A script that launches two processes with a backend's own launcher. Run once for each launch.

A launcher that runs the script again for further ranks finds everything in the arguments.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import DrivetrainError
from drivetrain_interfaces.launcher import LaunchRequest

if TYPE_CHECKING:
    from drivetrain_interfaces import World

SIZE = 2
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
)


def job(folder: str, fails: bool, world: World) -> str:  # noqa: FBT001 - bound by partial
    """What each rank runs: it notes who it is, and the last one may fail."""
    note = {
        "pid": os.getpid(),
        "time": time.time(),
        "world": place(world),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }
    draft = Path(folder, f"draft-{world.rank}")
    draft.write_text(json.dumps(note), encoding="utf-8")
    draft.rename(Path(folder, f"rank-{world.rank}.json"))
    if fails and world.rank == world.size - 1:
        raise RuntimeError("the last rank breaks")
    while fails:  # until the launcher ends this rank
        time.sleep(0.05)
    return f"from rank {world.rank}"


def place(world: World) -> list[Any]:
    """What a world says of a process."""
    return [world.rank, world.size, world.local_rank, world.local_size, world.address, world.port]


def main(question: dict[str, Any]) -> None:
    """Plan, launch, and write down what came of it."""
    sys.path[:] = question["path"]
    from drivetrain_conformance.target import find_target

    launcher = find_target(question["backend"]).spec.load().launcher(question["launcher"])
    assert launcher is not None
    folder = question["folder"]
    plan = launcher.plan(LaunchRequest(local_size=SIZE))
    started = [path.name for path in Path(folder).iterdir()]
    answer: dict[str, Any] = {
        "plan": [place(world) for world in plan.worlds],
        "name": plan.launcher,
        "started by the plan": started if os.environ.get("RANK", "0") == "0" else [],
    }
    try:
        answer["result"] = launcher.launch(partial(job, folder, question["fails"]), plan)
    except DrivetrainError as error:
        answer["error"] = [type(error).__name__, str(error)]
    answer["ended"] = time.time()
    if "error" in answer or answer["result"] == "from rank 0":
        Path(folder, "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    # By its name, so that what is launched can be imported in other processes.
    home = importlib.import_module("drivetrain_conformance.support.launching")
    home.main(json.loads(sys.argv[1]))
