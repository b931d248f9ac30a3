"""Which of the installed environments started this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import discovery
from drivetrain_interfaces.cluster import ClusterEnvironment, priority_of

from drivetrain_toolkit.environments.local import LOCAL
from drivetrain_toolkit.environments.reading import CLUSTER, LAUNCHED

if TYPE_CHECKING:
    from collections.abc import Mapping


def find_environment(env: Mapping[str, str]) -> ClusterEnvironment | None:
    """The registered environment with evidence, or None for a process that nobody manages.

    A process that a launcher of this package started is always read by ``LOCAL``. Otherwise
    ``DRIVETRAIN_CLUSTER`` decides where it is set: ``none`` finds nothing, a name finds that one.
    Among several with evidence the one of the highest priority is found.

    Raises:
        NotFoundError: ``DRIVETRAIN_CLUSTER`` names an environment that nobody registers.
    """
    if env.get(LAUNCHED):
        return LOCAL
    wanted = env.get(CLUSTER, "")
    if wanted == "none":
        return None
    if wanted:
        return _registered(wanted)
    found = [_registered(name) for name in discovery.registrations(discovery.ENVIRONMENTS)]
    claims = [each for each in found if each.detect(env)]
    return min(claims, key=lambda each: (-priority_of(each), each.name), default=None)


def _registered(name: str) -> ClusterEnvironment:
    return discovery.load(
        discovery.ENVIRONMENTS,
        name,
        ClusterEnvironment,  # type: ignore[type-abstract]  # a runtime-checkable protocol
        what="cluster environment",
    )
