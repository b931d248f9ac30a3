"""From a request and a surveyed machine to a plan: a pure function that says why.

Every decision goes into the record. Every conflict is collected, so that the user sees all of them
at once, with the decisions that they rest on. An explicit request that cannot be met is an error;
a free choice falls back, with a notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.asking import is_accelerator_object, sort_out
from drivetrain.deciding.abilities import check_abilities, unmet
from drivetrain.deciding.accelerator import choose_accelerator, note_cluster
from drivetrain.deciding.draft import Draft, combined
from drivetrain.deciding.launcher import ATTACH, NO_LAUNCHER, choose_launcher
from drivetrain.deciding.misspelled import refuse_misspelled
from drivetrain.deciding.places import choose_places, count_nodes
from drivetrain.deciding.precision import choose_precision
from drivetrain.deciding.strategy import choose_strategy
from drivetrain.plan import Parts, Plan, Resolution

if TYPE_CHECKING:
    from collections.abc import Iterable

    from drivetrain_interfaces.backend import BackendSpec

    from drivetrain.deciding.strategy import Engine
    from drivetrain.plan import Machine, Request, Want


def resolve(request: Request, machine: Machine) -> Resolution:
    """Decide everything about a run, from its request and the machine alone.

    Raises:
        NotFoundError: An accelerator, strategy, precision or launcher that nothing installed has.
        UnavailableError: An accelerator that is installed and cannot run here.
        UnsupportedError: Something that the chosen parts declare they cannot do.
        ClusterError: The cluster contradicts itself, or the arguments.
        ConfigurationError: Any other setting that cannot be met, or several of the above at once.
    """
    draft = Draft(request, machine, sort_out(request))
    draft.notices += draft.asks.notices
    for problem in draft.asks.problems:
        draft.refuse(problem)
    note_cluster(draft)
    entry = choose_accelerator(draft)
    num_nodes = count_nodes(draft)
    if entry is None or entry.spec is None or entry.probe is None:
        refuse_misspelled(draft)
        raise draft.error()
    spec = entry.spec
    places = choose_places(draft, spec, entry.probe, num_nodes)
    engine = choose_strategy(draft, spec, places)
    capabilities = spec.capabilities if engine is None else engine.capabilities
    precision = choose_precision(draft, spec, capabilities)
    launcher = choose_launcher(draft, spec, places)
    check_abilities(draft, capabilities, places)
    if draft.problems or places is None or engine is None:
        raise draft.error()
    finding, started_here = machine.cluster, launcher not in {NO_LAUNCHER, ATTACH}
    several_machines = started_here and places.num_nodes > 1
    plan = Plan(
        backend=spec.name,
        owner=entry.owner,
        devices=places.devices,
        num_nodes=places.num_nodes,
        world_size=places.world_size,
        local_size=places.local_size,
        strategy=engine.name,
        precision=precision,
        launcher=launcher,
        environment=finding.environment,
        sync_batchnorm=request.sync_batchnorm and places.world_size > 1,
        capabilities=capabilities,
        options=tuple(sorted(draft.asks.options.items())),
        node_rank=(machine.node_rank or 0) if several_machines else 0,
        address=machine.address if several_machines else "",
        port=machine.port if several_machines else 0,
        record=tuple(draft.record),
        notices=tuple(draft.notices),
    )
    return Resolution(plan, _parts(draft, spec, engine))


def check_wants(plan: Plan, wants: Iterable[Want]) -> None:
    """Refuse what a plan's parts cannot do, once it is known what is wanted.

    Raises:
        UnsupportedError: One thing is not supported; it names the setting or override.
        ConfigurationError: Several are not.
    """
    wanted = tuple(wants)
    about = ("accelerator", "strategy")
    problems = [(error, about) for error in unmet(plan.capabilities, plan, wanted)]
    if problems:
        raise combined(problems, plan.record)


def _parts(draft: Draft, spec: BackendSpec, engine: Engine) -> Parts:
    asks = draft.asks

    def own(kind: str) -> Any:
        ask = getattr(asks, kind)
        return None if ask is None or isinstance(ask.value, str) else ask.value

    wanted = draft.request.accelerator
    return Parts(
        spec=spec,
        strategy_factory=engine.factory,
        precision=own("precision"),
        launcher=own("launcher"),
        accelerator=wanted if is_accelerator_object(wanted) else None,  # type: ignore[arg-type]  # checked by the call
        checkpoint_io=own("checkpoint_io"),
        environment=own("environment"),
        world=draft.machine.cluster.world,
    )
