"""What a run is asked to be, what the machine has, and what was decided: plain frozen data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.discovery import Inventory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain_interfaces.accelerator import Accelerator
    from drivetrain_interfaces.backend import BackendSpec
    from drivetrain_interfaces.capabilities import Capabilities, Feature, StepHook
    from drivetrain_interfaces.checkpoint import CheckpointIO
    from drivetrain_interfaces.cluster import ClusterEnvironment, Machines, World
    from drivetrain_interfaces.errors import DrivetrainError
    from drivetrain_interfaces.launcher import Launcher
    from drivetrain_interfaces.precision import Precision
    from drivetrain_interfaces.strategy import StrategyFactory


@dataclass(frozen=True, slots=True)
class Want:
    """An ability that some setting needs.

    Attributes:
        what: The feature of the step, or the moment at which user code is called.
        asked_by: What the user wrote, such as ``"gradient_clip_val=1.0"``.
    """

    what: Feature | StepHook
    asked_by: str


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for, before anything is decided.

    Attributes:
        accelerator: A backend's name, its spec, an accelerator object, or ``"auto"``.
        devices: How many, which (``[0, 1]``, ``"0,1"``), ``-1`` for all, or ``"auto"``.
        num_nodes: How many machines.
        strategy: A name, a configured strategy object, or ``"auto"``.
        precision: A name, its short form (16, 32, 64, ``"bf16"``), an object, or None.
        launcher: A name, an object, or ``"auto"``.
        cluster_environment: A name, an object, ``"none"`` to ignore clusters, or ``"auto"``.
        plugins: Parts in any order: strategies, precisions, launchers, environments, checkpoint IO.
        gpus: Short form of "this many (or these) devices, and not the host itself".
        sync_batchnorm: Whether batch statistics are taken over all processes.
        wants: What other settings need of the chosen parts.
    """

    accelerator: str | BackendSpec | Accelerator = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: Any = "auto"
    precision: str | int | Precision | None = None
    launcher: str | Launcher = "auto"
    cluster_environment: str | ClusterEnvironment = "auto"
    plugins: tuple[Any, ...] = ()
    gpus: int | str | Sequence[int | str] | None = None
    sync_batchnorm: bool = False
    wants: tuple[Want, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that could have been chosen, and why it was or was not."""

    name: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of the decision record.

    Attributes:
        what: What was decided, such as ``"accelerator"``.
        chosen: The outcome, as text.
        asked_by: The setting that asked for it, or ``"default"``.
        evidence: The facts it rests on.
        candidates: What was looked at, the chosen one included.
    """

    what: str
    chosen: str
    asked_by: str
    evidence: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def summary(self) -> str:
        """The decision in one line, for error messages."""
        facts = "".join(f"; {fact}" for fact in self.evidence)
        seen = ", ".join(f"{one.name}: {one.verdict}" for one in self.candidates)
        considered = f"; considered {seen}" if seen else ""
        return f"{self.what}: {self.chosen} (asked by {self.asked_by}{facts}{considered})"

    def render(self) -> str:
        """The decision as a block of lines."""
        lines = [f"{self.what}: {self.chosen}", f"  asked by: {self.asked_by}"]
        lines += [f"  because: {fact}" for fact in self.evidence]
        lines += [f"  considered: {one.name} - {one.verdict}" for one in self.candidates]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ClusterFinding:
    """What the process's variables say about who started it.

    Attributes:
        world: The place of this process, or None when nobody else started it.
        environment: Name of the environment that was used; ``"local"`` when none was found.
        evidence: The facts that speak for it.
        candidates: Every environment that was asked, and its answer.
        problem: Why the world could not be read, as an error that can be raised.
        asked_by: The setting or variable that chose the environment, or ``"default"``.
        machines: The machines of the run, where their manager leaves starting ranks to a launcher.
        remarks: What users of the manager should be told.
    """

    world: World | None = None
    environment: str = "local"
    evidence: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    problem: DrivetrainError | None = None
    asked_by: str = "default"
    machines: Machines | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that was looked up before resolving; resolving itself looks nothing up.

    Attributes:
        inventory: What is installed, and what the probes found.
        cluster: Who started this process.
        interactive: Whether there is no script that could be run again (a prompt, a notebook).
        launched_by: The launcher of ours that started this process, or empty.
        node_rank: Number of this machine, where a variable says so without a cluster manager.
        address: Host of rank 0, likewise.
        port: Port at that host, likewise.
        distributions: Installed distributions that bring parts, as (name, version).
    """

    inventory: Inventory = field(default_factory=Inventory)
    cluster: ClusterFinding = field(default_factory=ClusterFinding)
    interactive: bool = False
    launched_by: str = ""
    node_rank: int | None = None
    address: str = ""
    port: int = 0
    distributions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the run is going to be, and why. Plain data: it pickles, and prints.

    Attributes:
        backend: Name of the backend.
        owner: Its distribution and version.
        devices: Indices of this machine's devices.
        num_nodes: Number of machines.
        world_size: Number of processes of the whole run.
        local_size: Number of processes on this machine.
        strategy: Name of the strategy.
        precision: Name of the precision.
        launcher: Name of the launcher; ``"none"`` when no process is to be started, ``"attach"``
            when somebody else has started them.
        environment: Name of the cluster environment.
        sync_batchnorm: Whether batch statistics are taken over all processes.
        capabilities: What the backend and the strategy can both do.
        options: Options of the strategy that a name such as ``ddp_find_unused_parameters_true``
            stands for, as (name, value).
        node_rank: Number of this machine.
        address: Host of rank 0 for a launcher that serves several machines; else empty.
        port: Port at that host; else 0.
        record: Every decision, in order.
        notices: What the user should know, once, on rank zero.
    """

    backend: str
    owner: str
    devices: tuple[int, ...]
    num_nodes: int
    world_size: int
    local_size: int
    strategy: str
    precision: str
    launcher: str
    environment: str
    sync_batchnorm: bool
    capabilities: Capabilities
    options: tuple[tuple[str, Any], ...] = ()
    node_rank: int = 0
    address: str = ""
    port: int = 0
    record: tuple[Decision, ...] = ()
    notices: tuple[str, ...] = ()

    def decision(self, what: str) -> Decision:
        """The decision about ``what``. Raises ``KeyError`` if there was none."""
        for one in self.record:
            if one.what == what:
                return one
        raise KeyError(what)

    def summary(self) -> str:
        """The plan in one line."""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        machines = "" if self.num_nodes == 1 else f" on {self.num_nodes} machines"
        return (
            f"{self.strategy} on {self.backend} ({self.owner}), devices "
            f"{', '.join(map(str, self.devices))}, {processes}{machines}, "
            f"precision {self.precision}, launcher {self.launcher}"
        )

    def explain(self) -> str:
        """The plan and its decision record as text, one block for each decision."""
        blocks = [f"plan: {self.summary()}", *(one.render() for one in self.record)]
        blocks += [f"notice: {notice}" for notice in self.notices]
        return "\n\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """The plan as values that JSON knows."""
        plain = asdict(self)
        plain["capabilities"] = {
            "features": sorted(one.value for one in self.capabilities.features),
            "precisions": sorted(self.capabilities.precisions),
            "hooks": sorted(one.value for one in self.capabilities.hooks),
        }
        plain["options"] = dict(self.options)
        return plain

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True, slots=True)
class Parts:
    """The live objects that go with a plan. Kept apart from it, since not all of them pickle.

    Attributes:
        spec: The backend's spec.
        strategy_factory: Makes the strategy from a context, in the process that uses it.
        precision: The user's own precision, or None for the backend's of the plan's name.
        launcher: The user's own launcher, or None for the one of the plan's name.
        accelerator: The user's own accelerator, or None for the backend's.
        checkpoint_io: The user's own checkpoint IO, or None for the backend's.
        environment: The user's own cluster environment, or None for the one of the plan's name.
        world: The place of this process where somebody else has started it, or None.
    """

    spec: BackendSpec
    strategy_factory: StrategyFactory
    precision: Precision | None = None
    launcher: Launcher | None = None
    accelerator: Accelerator | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None
    world: World | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """A plan and the live objects that go with it."""

    plan: Plan
    parts: Parts
