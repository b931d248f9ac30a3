"""From a request to the place of every process on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces.errors import ClusterError
from drivetrain_interfaces.launcher import LaunchPlan

from drivetrain_toolkit.environments import CLUSTER, LAUNCHED, LOCAL, find_environment
from drivetrain_toolkit.processes import PortReservation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.launcher import LaunchRequest

LOOPBACK: Final = "127.0.0.1"


def check_request(request: LaunchRequest, launcher: str) -> None:
    """Refuse a request that no launcher can meet.

    Raises:
        ClusterError: Numbers are out of range, or several machines lack an address and a port.
    """
    asked = check_numbers(request, launcher)
    if not 0 <= request.node_rank < request.num_nodes:
        raise ClusterError(
            f"{asked} as machine number {request.node_rank}.",
            f"Number the machines from 0 to {request.num_nodes - 1}.",
        )
    if request.num_nodes > 1 and not (request.address and request.port):
        raise ClusterError(
            f"{asked}, with address {request.address!r} and port {request.port}.",
            "Set MASTER_ADDR and MASTER_PORT to a host and a free port of machine 0, and NODE_RANK "
            "to the number of each machine, or start the script with torchrun.",
        )


def check_numbers(request: LaunchRequest, launcher: str) -> str:
    """What was asked for, as the beginning of a sentence.

    Raises:
        ClusterError: It is no process, or no machine.
    """
    asked = f"The {launcher!r} launcher was asked for {describe(request)}"
    if request.local_size < 1 or request.num_nodes < 1:
        raise ClusterError(f"{asked}.", "Ask for at least one process and one machine.")
    return asked


def describe(request: LaunchRequest) -> str:
    """``2 processes on each of 3 machines``."""
    return f"{request.local_size} processes on each of {request.num_nodes} machines"


def refuse_inside_a_rank(launcher: str) -> None:
    """Stop a rank from starting ranks: every one of those would do the same, without end.

    Raises:
        ClusterError: Some manager or launcher started this process.
    """
    environment = find_environment(os.environ)
    if environment is not None:
        raise ClusterError(
            f"The {launcher!r} launcher was to start processes, but this process is one of several "
            f"already: {environment.world(os.environ).evidence}.",
            f"Use launcher='attach', or set {CLUSTER}=none to ignore these variables.",
        )


def world_here() -> World | None:
    """The place of this process as its environment says, or None where nobody started it."""
    environment = find_environment(os.environ)
    return environment.world(os.environ) if environment else None


def check_fits(request: LaunchRequest, world: World) -> None:
    """Refuse to run in a world of another shape than was asked for.

    Raises:
        ClusterError: Another number of processes was started.
    """
    several = world.size > world.local_size
    if request.local_size != world.local_size or several != (request.num_nodes > 1):
        raise ClusterError(
            f"{describe(request)} were asked for, and {world.local_size} of {world.size} "
            f"processes were started on this machine ({', '.join(world.evidence)}).",
            "Ask for what was started, or start what is asked for.",
        )


def place(world: World, launcher: str) -> dict[str, str]:
    """The variables that tell a process its place; ``LOCAL`` reads them."""
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "NODE_RANK": str(world.node_rank),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
        LAUNCHED: launcher,
        # The user's choice was about managers; this process has one now.
        CLUSTER: LOCAL.name,
    }


def make_plan(
    request: LaunchRequest,
    launcher: str,
    *,
    reservation: PortReservation | None,
    command: Sequence[str] = (),
    environment: Sequence[tuple[str, str]] = (),
) -> LaunchPlan:
    """The plan for this machine's processes.

    Args:
        request: What was asked for; checked already.
        launcher: Name of the launcher.
        reservation: The port to meet at, where the request names none.
        command: What each process runs.
        environment: Variables besides those of the place.
    """
    address = request.address or LOOPBACK
    port = request.port or (reservation.port if reservation else 0)
    size = request.local_size * request.num_nodes
    worlds = tuple(
        LOCAL.world(
            {
                "RANK": str(request.node_rank * request.local_size + index),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(index),
                "LOCAL_WORLD_SIZE": str(request.local_size),
                "NODE_RANK": str(request.node_rank),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                LAUNCHED: launcher,
            }
        )
        for index in range(request.local_size)
    )
    return LaunchPlan(launcher, worlds, tuple(command), tuple(environment))


def reserve(request: LaunchRequest) -> PortReservation | None:
    """A free port where the request needs one and names none."""
    size = request.local_size * request.num_nodes
    return PortReservation() if size > 1 and not request.port else None
