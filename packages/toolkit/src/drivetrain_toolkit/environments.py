"""Reading a process's place in the run from environment variables. Imports no torch.

Rules: docs/contracts/cluster.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import discovery
from drivetrain_interfaces.cluster import ClusterEnvironment, World
from drivetrain_interfaces.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Set by the launchers of this package to their name, in every process that they make a rank.
LAUNCHED: Final = "DRIVETRAIN_LAUNCHED"
#: The user's switch: a name, or "none" to look at no environment.
CLUSTER: Final = "DRIVETRAIN_CLUSTER"

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_LARGEST_PORT = 65535


def facts(env: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """``NAME=value`` for each of ``names`` that is set, in that order."""
    return tuple(f"{name}={env[name]}" for name in names if env.get(name, "") != "")


@dataclass(frozen=True, slots=True)
class LocalEnvironment:
    """Ranks that a launcher of this package, or a person, described by the usual variables.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` are all needed, and
    ``MASTER_ADDR`` and ``MASTER_PORT`` besides, unless ``WORLD_SIZE`` is 1. Nothing is guessed from
    a part of them: a wrong guess is a run that waits forever, or several runs of one process.
    """

    name: str = "local"

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The variables that say that this process is a rank; empty under another manager.

        ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK`` alone are no evidence: they describe a
        machine, not a process.
        """
        if TORCHRUN.detect(env):
            return ()
        return facts(env, (*_PLACE, LAUNCHED))

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process, or a world of one where no variable is set.

        Raises:
            ClusterError: Variables are missing, are no numbers, or contradict each other.
        """
        evidence = facts(env, (*_PLACE, "NODE_RANK", *_ADDRESS, LAUNCHED))
        if not facts(env, (*_PLACE, LAUNCHED)):
            return World(environment=self.name)
        return _Reading(self.name, env, evidence).world(node="NODE_RANK", restarts=None)


@dataclass(frozen=True, slots=True)
class TorchRunEnvironment:
    """Ranks that torchrun started, with its count of restarts."""

    name: str = "torchrun"

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """``TORCHELASTIC_RUN_ID``, which torchrun and nobody else sets."""
        return facts(env, ("TORCHELASTIC_RUN_ID",))

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process.

        Raises:
            ClusterError: torchrun's variables are missing or were changed after it set them.
        """
        names = (*_PLACE, "GROUP_RANK", *_ADDRESS)
        elastic = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        reading = _Reading(self.name, env, facts(env, (*elastic, *names)))
        if not self.detect(env):
            raise reading.error("TORCHELASTIC_RUN_ID is not set", "Start the script with torchrun.")
        return reading.world(node="GROUP_RANK", restarts="TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True, slots=True)
class _Reading:
    """One attempt to read a world, with what every error of it quotes."""

    name: str
    env: Mapping[str, str]
    evidence: tuple[str, ...]

    def error(self, problem: str, hint: str) -> ClusterError:
        found = ", ".join(self.evidence) or "none of its variables"
        return ClusterError(
            f"The {self.name!r} environment was to be read, but {problem} (found: {found}).", hint
        )

    def world(self, *, node: str, restarts: str | None) -> World:
        size = self._number("WORLD_SIZE", least=1, default=None)
        alone = size == 1
        rank = self._number("RANK", least=0, default=0 if alone else None)
        local_rank = self._number("LOCAL_RANK", least=0, default=0 if alone else None)
        local_size = self._number("LOCAL_WORLD_SIZE", least=1, default=1 if alone else None)
        self._check(rank, size, local_rank, local_size)
        node_rank = self._number(node, least=0, default=rank // local_size)
        if local_size == size and node_rank:
            raise self._contradiction(
                f"{node}={node_rank} is a second machine, but all {size} ranks are on one"
            )
        return World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            node_rank=node_rank,
            address="" if alone else self._text("MASTER_ADDR"),
            port=0 if alone else self._port(),
            restarts=self._number(restarts, least=0, default=0) if restarts else 0,
            environment=self.name,
            evidence=self.evidence,
        )

    def _check(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        if rank >= size:
            raise self._contradiction(f"RANK={rank} is outside WORLD_SIZE={size}")
        if local_rank >= local_size:
            raise self._contradiction(
                f"LOCAL_RANK={local_rank} is outside LOCAL_WORLD_SIZE={local_size}"
            )
        if local_size > size:
            raise self._contradiction(
                f"LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={size}"
            )
        if local_size == size and local_rank != rank:
            raise self._contradiction(
                f"all {size} ranks are on this machine, but RANK={rank} is LOCAL_RANK={local_rank}"
            )

    def _contradiction(self, problem: str) -> ClusterError:
        return self.error(
            problem, "Correct the variables, or unset all of them to run one process."
        )

    def _text(self, name: str) -> str:
        value = self.env.get(name, "")
        if not value:
            raise self.error(
                f"{name} is not set",
                f"Set {name} too, or unset the others to run one process.",
            )
        return value

    def _number(self, name: str, *, least: int, default: int | None) -> int:
        if default is not None and not self.env.get(name, ""):
            return default
        text = self._text(name)
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise self.error(
                f"{name}={text!r} is not a whole number of at least {least}", f"Correct {name}."
            )
        return int(text)

    def _port(self) -> int:
        port = self._number("MASTER_PORT", least=1, default=None)
        if port > _LARGEST_PORT:
            raise self.error(
                f"MASTER_PORT={port} is above {_LARGEST_PORT}", "Choose a port between 1024 and it."
            )
        return port


LOCAL: Final = LocalEnvironment()
TORCHRUN: Final = TorchRunEnvironment()


def find_environment(env: Mapping[str, str]) -> ClusterEnvironment | None:
    """The registered environment with evidence, or None for a process that nobody manages.

    A process that a launcher of this package started is always read by ``LOCAL``. Otherwise
    ``DRIVETRAIN_CLUSTER`` decides where it is set: ``none`` finds nothing, a name finds that one.

    Raises:
        NotFoundError: ``DRIVETRAIN_CLUSTER`` names an environment that nobody registers.
        ClusterError: Several environments have evidence.
    """
    if env.get(LAUNCHED):
        return LOCAL
    wanted = env.get(CLUSTER, "")
    if wanted == "none":
        return None
    names = (wanted,) if wanted else tuple(discovery.registrations(discovery.ENVIRONMENTS))
    found = [_registered(name) for name in names]
    seen = {each.name: (each, each.detect(env)) for each in found}
    claims = {name: evidence for name, (_, evidence) in seen.items() if evidence}
    if len(claims) > 1:
        raise ClusterError(
            f"One cluster was looked for, and several left their marks: {claims}.",
            f"Set {CLUSTER} to one of {sorted(claims)}, or to 'none'.",
        )
    if wanted:
        return found[0]
    return next((seen[name][0] for name in claims), None)


def _registered(name: str) -> ClusterEnvironment:
    return discovery.load(
        discovery.ENVIRONMENTS,
        name,
        ClusterEnvironment,  # type: ignore[type-abstract]  # a runtime-checkable protocol
        what="cluster environment",
    )
