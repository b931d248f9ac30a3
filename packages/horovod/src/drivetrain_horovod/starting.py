"""Horovod itself: imported, and connected to the processes that there are.

``horovodrun`` sets variables that say who is who. Under any other launcher, each process would be a
world of one without a word; so rank 0 starts Horovod's rendezvous, and every rank is told.
"""

from __future__ import annotations

import atexit
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import BrokenPackageError, ClusterError, UnavailableError
from drivetrain_toolkit.checks import same_version

if TYPE_CHECKING:
    from types import ModuleType

    from drivetrain_interfaces import Collectives, World

_ADDRESS = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
_SERVERS: list[Any] = []


def import_horovod() -> ModuleType:
    """The package.

    Raises:
        UnavailableError: It is not installed.
        BrokenPackageError: It was built for another torch, or without torch.
    """
    try:
        import horovod.torch as hvd
    except ModuleNotFoundError as error:
        if error.name not in {"horovod", "horovod.torch"}:
            raise
        raise UnavailableError(
            "The strategy 'horovod' was asked for, and Horovod is not installed.",
            "Build it as docs/backends/horovod.md says, or use 'ddp'.",
        ) from error
    except ImportError as error:
        raise BrokenPackageError(
            f"Horovod could not be imported: {error}.",
            "Build it again for this version of torch, or use 'ddp'.",
        ) from error
    made: ModuleType = hvd
    return made


def start(world: World, collectives: Collectives) -> ModuleType:
    """Horovod, with as many ranks as the world has.

    Raises:
        UnavailableError: It is not installed.
        ClusterError: Ranks have different versions of it; it has other ranks than the run; or it
            cannot start under this launcher.
    """
    hvd = import_horovod()
    if world.size > 1:
        same_version("Horovod", import_module("horovod").__version__, collectives)
    if not hvd.is_initialized():
        if world.size > 1 and "HOROVOD_RANK" not in os.environ:
            _introduce(world, collectives)
        os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")  # else there are no sub-groups
        hvd.init()
        atexit.register(hvd.shutdown)
    if hvd.size() != world.size or hvd.rank() != world.rank:
        raise ClusterError(
            f"This is rank {world.rank} of {world.size}, and Horovod has rank {hvd.rank()} of "
            f"{hvd.size()}.",
            "Start the processes with one launcher alone: horovodrun, or the trainer's own.",
        )
    return hvd


def _introduce(world: World, collectives: Collectives) -> None:
    """Tell Horovod what ``horovodrun`` would."""
    if world.local_size != world.size:
        raise ClusterError(
            f"The run has {world.size} processes on several machines, which Horovod's own "
            "launcher has to introduce to each other.",
            "Start them with horovodrun --gloo, or use 'ddp'.",
        )
    port = collectives.broadcast_object(_serve(world) if world.rank == 0 else None)
    place = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    place |= {"SIZE": world.size, "LOCAL_SIZE": world.local_size}
    os.environ.update({f"HOROVOD_{name}": str(value) for name, value in place.items()})
    os.environ.update(
        {
            _ADDRESS: "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_GLOO_IFACE": os.environ.get("HOROVOD_GLOO_IFACE", "lo"),
            "HOROVOD_HOSTNAME": "localhost",
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
        }
    )


def _serve(world: World) -> int:
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port: int = server.start()
    server.init(get_host_assignments(parse_hosts(f"localhost:{world.size}"), world.size))
    _SERVERS.append(server)  # until the process ends: Horovod asks it again when it shuts down
    return port
