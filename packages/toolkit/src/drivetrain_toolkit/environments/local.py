"""Ranks that a launcher of this package, or a person, described by the usual variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces.cluster import World

from drivetrain_toolkit.environments.kubeflow import KUBEFLOW
from drivetrain_toolkit.environments.reading import ADDRESS, LAUNCHED, PLACE, Reading, facts
from drivetrain_toolkit.environments.torchrun import TORCHRUN

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class LocalEnvironment:
    """Ranks that a launcher of this package, or a person, described by the usual variables.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` are all needed, and
    ``MASTER_ADDR`` and ``MASTER_PORT`` besides, unless ``WORLD_SIZE`` is 1. Nothing is guessed from
    a part of them: a wrong guess is a run that waits forever, or several runs of one process.
    """

    name: str = "local"
    priority: int = 0

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The variables that say that this process is a rank; empty under another manager.

        ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK`` alone are no evidence: they describe a
        machine, not a process.
        """
        if TORCHRUN.detect(env) or KUBEFLOW.describes_pod(env):
            return ()
        return facts(env, (*PLACE, LAUNCHED))

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process, or a world of one where no variable is set.

        Raises:
            ClusterError: Variables are missing, are no numbers, or contradict each other.
        """
        evidence = facts(env, (*PLACE, "NODE_RANK", *ADDRESS, LAUNCHED))
        if not facts(env, (*PLACE, LAUNCHED)):
            return World(environment=self.name)
        reading = Reading(self.name, env, evidence)
        place = reading.place(PLACE, "NODE_RANK")
        if place.size == 1:
            return reading.world(place, "", 0)
        return reading.world(place, reading.address(), reading.port())


LOCAL: Final = LocalEnvironment()
