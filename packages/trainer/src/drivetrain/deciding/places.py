"""Which devices, and how many processes on how many machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.capabilities import Feature
from drivetrain_interfaces.errors import (
    ClusterError,
    ConfigurationError,
    DrivetrainError,
)

from drivetrain.deciding.draft import count, processes
from drivetrain.deciding.launcher import NO_LAUNCHER

if TYPE_CHECKING:
    from drivetrain_interfaces.backend import BackendSpec, Probe
    from drivetrain_interfaces.cluster import World

    from drivetrain.deciding.draft import Draft


#: Launchers that start the processes of their own machine, so that each machine runs one.
_OF_ONE_MACHINE: Final = frozenset({"script", "spawn", "fork", "forkserver", "notebook"})


@dataclass(frozen=True, slots=True)
class Places:
    """Devices and processes of this machine and of the run."""

    devices: tuple[int, ...]
    num_nodes: int
    world_size: int
    local_size: int

    @property
    def several(self) -> bool:
        """Whether more than one device takes part."""
        return self.world_size > 1 or len(self.devices) > 1


def count_nodes(draft: Draft) -> int:
    """The number of machines that was asked for; 1 if that is no number."""
    asked: Any = draft.request.num_nodes
    if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
        return _told_nodes(draft, asked)
    draft.refuse(
        ConfigurationError(
            f"num_nodes={asked!r} was asked for, and a run needs a whole number of machines.",
            "Give 1 or more.",
        )
    )
    return 1


def _told_nodes(draft: Draft, asked: int) -> int:
    """The number of machines, where their manager tells it and leaves the ranks to a launcher."""
    told = draft.machine.cluster.machines
    if told is None or told.num_nodes == asked:
        return asked
    if asked != 1:
        draft.refuse(
            ClusterError(
                f"num_nodes={asked} was asked for, and {told.environment} started "
                f"{count(told.num_nodes, 'machine')} ({', '.join(told.evidence)}).",
                "Make them equal, or leave num_nodes out.",
            ),
            "cluster environment",
        )
    return told.num_nodes


def _strategy_in_one_process(draft: Draft) -> bool:
    """Whether the strategy that was asked for drives all devices of a machine from one process."""
    ask = draft.asks.strategy
    if ask is None:
        return False
    if not isinstance(ask.value, str):
        return getattr(ask.value, "one_process", False) is True
    return any(
        entry.name == ask.value and entry.spec is not None and entry.spec.one_process
        for entry in draft.machine.inventory.strategies
    )


def _wants_processes(draft: Draft, spec: BackendSpec) -> bool:
    """Whether the strategy wants a process for each device, where others of the family do not."""
    ask = draft.asks.strategy
    if ask is None or not spec.facts.process_launcher:
        return False
    if not isinstance(ask.value, str):
        return Feature.SEVERAL_PROCESSES in getattr(ask.value, "capabilities", ())
    known = {
        entry.name: entry.spec.capabilities
        for entry in draft.machine.inventory.strategies
        if entry.spec is not None
    } | {name: spec.capabilities_of(name) for name in spec.strategies}
    return Feature.SEVERAL_PROCESSES in known.get(ask.value, ())


def choose_places(draft: Draft, spec: BackendSpec, probe: Probe, num_nodes: int) -> Places | None:
    """Devices and processes, held against what a cluster has started."""
    world = draft.machine.cluster.world
    # Some families drive all devices of a machine from one process; their facts say so.
    by_strategy = _strategy_in_one_process(draft)
    one_process = by_strategy or (
        spec.facts.several_devices_launcher == NO_LAUNCHER and not _wants_processes(draft, spec)
    )
    devices = _devices(draft, spec, probe, None if one_process else world)
    if devices is None:
        return None
    if by_strategy:
        draft.asks.options.setdefault("devices", devices)
    local = 1 if one_process else len(devices)
    if world is None:
        places = Places(devices, num_nodes, local * num_nodes, local)
        _check_meeting_point(draft, places)
        _check_told_processes(draft, local)
    else:
        nodes = world.machines
        if world.devices_apart:  # how many there are says nothing of processes
            local = world.local_size
        _check_world(draft, world, local, num_nodes, nodes)
        places = Places(devices, nodes, world.size, world.local_size)
    draft.decide(
        "processes",
        places.world_size,
        "default" if world is None else draft.machine.cluster.environment,
        (
            f"{count(places.num_nodes, 'machine')} with {processes(places.local_size)} each",
            f"{count(len(devices), 'device')} on this machine",
        ),
    )
    return places


def _devices(
    draft: Draft, spec: BackendSpec, probe: Probe, world: World | None
) -> tuple[int, ...] | None:
    ask = draft.asks.devices
    found = f"{spec.name} found {count(probe.devices, 'device')}"
    told = draft.machine.cluster.machines
    if world is not None and world.devices_apart:
        return _own_device(draft, spec, probe, world)
    if ask is not None:
        wanted, by, why = ask.value, ask.by, found
    elif told is not None and told.local_size:
        wanted, by = told.local_size, told.environment
        why = f"{processes(told.local_size)} on each machine; {found}"
    elif world is not None:
        wanted, by = world.local_size, draft.machine.cluster.environment
        why = f"{processes(world.local_size)} on this machine; {found}"
    else:
        default = spec.facts.default_devices
        wanted = min(default, probe.devices) if default else "auto"
        by, why = "default", f"{found}, {default or 'all'} by default"
    try:
        devices = spec.parse_devices(wanted, probe, spec.name)
    except DrivetrainError as error:
        about = ("accelerator",) if world is None else ("accelerator", "cluster environment")
        draft.refuse(_device_problem(draft, error, by, world), *about)
        return None
    draft.decide("devices", ", ".join(map(str, devices)), by, (why,))
    return tuple(devices)


def _own_device(
    draft: Draft, spec: BackendSpec, probe: Probe, world: World
) -> tuple[int, ...] | None:
    """The device of a process that its manager lets see no other; ``devices=`` counts processes."""
    ask, name = draft.asks.devices, draft.machine.cluster.environment
    evidence = f"{name} lets each process see its own devices only"
    if ask is not None and ask.value not in (world.local_size, str(world.local_size), -1, "-1"):
        draft.refuse(
            ClusterError(
                f"{ask.by} was asked for, and {name} started {processes(world.local_size)} on this "
                f"machine, each of which sees its own devices only "
                f"({', '.join(draft.machine.cluster.evidence)}).",
                f"Use devices={world.local_size}, or leave devices= out.",
            ),
            "cluster environment",
        )
        return None
    try:
        devices = tuple(spec.parse_devices(1, probe, spec.name))
    except DrivetrainError as error:
        about = ("accelerator", "cluster environment")
        draft.refuse(_device_problem(draft, error, name, world), *about)
        return None
    draft.decide("devices", ", ".join(map(str, devices)), ask.by if ask else name, (evidence,))
    return devices


def _check_told_processes(draft: Draft, local: int) -> None:
    told, ask = draft.machine.cluster.machines, draft.asks.devices
    if told is None or ask is None or told.local_size in (0, local):
        return
    draft.refuse(
        ClusterError(
            f"{ask.by} makes {processes(local)} on each machine, and {told.environment} was told "
            f"to have {told.local_size} ({', '.join(told.evidence)}).",
            "Make them equal, or leave devices= out.",
        ),
        "cluster environment",
        "devices",
    )


def _device_problem(
    draft: Draft, error: DrivetrainError, by: str, world: World | None
) -> DrivetrainError:
    if world is not None and draft.asks.devices is None:
        problem: DrivetrainError = ClusterError(
            f"{by} started {processes(world.local_size)} on this machine "
            f"({', '.join(draft.machine.cluster.evidence)}), and they need a device each. "
            f"{error.message}",
            "Start fewer processes, or set DRIVETRAIN_CLUSTER=none to ignore them.",
        )
    elif by.startswith("gpus="):
        problem = type(error)(f"{by} means devices: {error.message}", error.hint)
    else:
        problem = type(error)(error.message, error.hint)
    problem.__cause__ = error
    return problem


def _check_world(draft: Draft, world: World, local: int, num_nodes: int, nodes: int) -> None:
    name = draft.machine.cluster.environment
    facts = f"{name} started {world.size} ({', '.join(draft.machine.cluster.evidence)})"
    ask = draft.asks.devices
    about = ("cluster environment", "devices")
    if ask is not None and local * num_nodes != world.size:
        draft.refuse(
            ClusterError(
                f"{ask.by} with num_nodes={num_nodes} makes {local * num_nodes} processes, and "
                f"{facts}.",
                "Make them equal, leave devices= out to use what was started, or set "
                "DRIVETRAIN_CLUSTER=none to ignore it.",
            ),
            *about,
        )
    elif num_nodes not in {1, nodes}:
        draft.refuse(
            ClusterError(
                f"num_nodes={num_nodes} was asked for, and {facts}, {world.local_size} on this "
                f"machine, which makes {count(nodes, 'machine')}.",
                "Leave num_nodes out, or start the program on as many machines.",
            ),
            *about,
        )
    elif ask is not None and local != world.local_size:
        draft.refuse(
            ClusterError(
                f"{ask.by} makes {local} processes on each machine, and {name} started "
                f"{world.local_size} on this one ({', '.join(draft.machine.cluster.evidence)}).",
                "Make them equal, or leave devices= out.",
            ),
            *about,
        )


def _check_meeting_point(draft: Draft, places: Places) -> None:
    """Several machines without a manager must be told who is who, or they would wait for ever."""
    ask = draft.asks.launcher
    # Any other launcher may reach all machines by itself; its own plan says what it lacks.
    here = ask is None or (isinstance(ask.value, str) and ask.value in _OF_ONE_MACHINE)
    if places.num_nodes == 1 or not here:
        return
    machine = draft.machine
    missing = [
        name
        for name, there in (
            ("NODE_RANK", machine.node_rank is not None),
            ("MASTER_ADDR", machine.address),
            ("MASTER_PORT", machine.port),
        )
        if not there
    ]
    if missing:
        draft.refuse(
            ClusterError(
                f"num_nodes={places.num_nodes} was asked for, no cluster manager was found, and "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
                "Start the program with torchrun on every machine, or set NODE_RANK, MASTER_ADDR "
                "and MASTER_PORT on each.",
            ),
            "cluster environment",
        )
