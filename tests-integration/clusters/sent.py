"""Send a function by a launcher and print what comes back. Loads no torch."""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

from drivetrain_interfaces.launcher import LaunchRequest
from drivetrain_toolkit import launchers


class Answer:
    def __init__(self, value: Any) -> None:
        self.value = value


def work(world: Any) -> Answer:
    print(f"rank {world.rank} of {world.size} on {socket.gethostname()}", flush=True)
    if FAILING and world.rank == world.size - 1:
        raise ValueError("bad luck")
    return Answer([world.size, world.machines, world.environment, world.address])


NAME, SETTINGS, NODES, FAILING = (
    sys.argv[1],
    json.loads(sys.argv[2]),
    int(sys.argv[3]),
    sys.argv[4:],
)

if __name__ == "__main__":
    launcher = getattr(launchers, NAME)(**SETTINGS)
    answer = launcher.launch(work, launcher.plan(LaunchRequest(local_size=2, num_nodes=NODES)))
    assert type(answer) is Answer
    os.write(1, f"FOUND {json.dumps(answer.value)}\n".encode())  # in one piece, beside other ranks
