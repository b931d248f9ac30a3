"""Reading numbers out of variables, with errors that quote all that was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Set by the launchers of this package to their name, in every process that they make a rank.
LAUNCHED: Final = "DRIVETRAIN_LAUNCHED"
#: The user's switch: a name, or "none" to look at no environment.
CLUSTER: Final = "DRIVETRAIN_CLUSTER"

PLACE: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS: Final = ("MASTER_ADDR", "MASTER_PORT")
LARGEST_PORT: Final = 65535
#: The host of rank 0, for ranks that are all on it: no name has to be resolved.
LOOPBACK: Final = "127.0.0.1"


def facts(env: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """``NAME=value`` for each of ``names`` that is set, in that order."""
    return tuple(f"{name}={env[name]}" for name in names if env.get(name, "") != "")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands, before it is known where rank 0 can be reached.

    Attributes:
        rank: Its number, with the variable's name where an error quotes it.
        size: Number of processes.
        local_rank: Its number on its machine.
        local_size: Number of processes on its machine.
        node_rank: Number of its machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int


@dataclass(frozen=True, slots=True)
class Reading:
    """One attempt to read a world, with what every error of it quotes."""

    name: str
    env: Mapping[str, str]
    evidence: tuple[str, ...]

    def error(self, problem: str, hint: str) -> ClusterError:
        """The error for something that cannot be read."""
        found = ", ".join(self.evidence) or "none of its variables"
        return ClusterError(
            f"The {self.name!r} environment was to be read, but {problem} (found: {found}).", hint
        )

    def contradiction(self, problem: str) -> ClusterError:
        """The error for two facts that cannot both be true."""
        return self.error(
            problem, "Correct the variables, or unset all of them to run one process."
        )

    def text(self, name: str) -> str:
        """The value of a variable. Raises ``ClusterError`` where it is not set."""
        value = self.env.get(name, "")
        if not value:
            raise self.error(
                f"{name} is not set",
                f"Set {name} too, or unset the others to run one process.",
            )
        return value

    def number(self, name: str, *, least: int = 0, default: int | None = None) -> int:
        """The whole number in a variable. Raises ``ClusterError`` where there is none."""
        if default is not None and not self.env.get(name, ""):
            return default
        text = self.text(name)
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise self.error(
                f"{name}={text!r} is not a whole number of at least {least}", f"Correct {name}."
            )
        return int(text)

    def port(self, name: str = "MASTER_PORT") -> int:
        """The TCP port in a variable. Raises ``ClusterError`` where there is none."""
        port = self.number(name, least=1)
        if port > LARGEST_PORT:
            raise self.error(
                f"{name}={port} is above {LARGEST_PORT}", "Choose a port between 1024 and it."
            )
        return port

    def address(self, name: str = "MASTER_ADDR") -> str:
        """The host in a variable; an IPv6 address without the brackets that a URL has."""
        text = self.text(name)
        return text[1:-1] if text.startswith("[") and text.endswith("]") else text

    def place(self, names: Sequence[str], node: str = "") -> Place:
        """The place that four variables and the machine's number tell.

        Args:
            names: The variables for rank, size, local rank and local size.
            node: The variable for the number of the machine, where there is one.
        """
        of_rank, of_size, of_local_rank, of_local_size = names
        size = self.number(of_size, least=1)
        alone = size == 1
        rank = self.number(of_rank, default=0 if alone else None)
        local_rank = self.number(of_local_rank, default=0 if alone else None)
        local_size = self.number(of_local_size, least=1, default=1 if alone else None)
        if rank >= size:
            raise self.contradiction(f"{of_rank}={rank} is outside {of_size}={size}")
        if local_rank >= local_size:
            raise self.contradiction(
                f"{of_local_rank}={local_rank} is outside {of_local_size}={local_size}"
            )
        if local_size > size:
            raise self.contradiction(f"{of_local_size}={local_size} is more than {of_size}={size}")
        if local_size == size and local_rank != rank:
            raise self.contradiction(
                f"all {size} ranks are on this machine, but {of_rank}={rank} is "
                f"{of_local_rank}={local_rank}"
            )
        node_rank = machine_of(rank, size, local_rank, local_size)
        if node:
            node_rank = self.number(node, default=node_rank)
        if local_size == size and node_rank:
            raise self.contradiction(
                f"{node}={node_rank} is a second machine, but all {size} ranks are on one"
            )
        return Place(rank, size, local_rank, local_size, node_rank)

    def agree(self, place: Place) -> None:
        """Refuse ``RANK`` and its like where somebody set them to another place than this one.

        They are what a launcher inside the job would set, so that both would be right about
        something; which of them is meant only the user knows, and says by ``DRIVETRAIN_CLUSTER``.

        Raises:
            ClusterError: They contradict; both facts are quoted.
        """
        if self.env.get(CLUSTER, "") == self.name:
            return
        told = (place.rank, place.size, place.local_rank, place.local_size)
        for name, value in zip(PLACE, told, strict=True):
            text = self.env.get(name, "")
            if text and text != str(value):
                raise self.error(
                    f"it makes this process rank {place.rank} of {place.size} (local rank "
                    f"{place.local_rank} of {place.local_size}), and {name}={text} is set too",
                    f"Unset {name}, or set {CLUSTER} to {self.name!r} or to the environment that "
                    f"set {name}.",
                )

    def world(
        self,
        place: Place,
        address: str,
        port: int,
        *,
        num_nodes: int = 0,
        restarts: int = 0,
        max_restarts: int = 0,
        job: str = "",
        devices_apart: bool = False,
    ) -> World:
        """The world of a place; a single process has neither address nor port."""
        alone = place.size == 1
        return World(
            rank=place.rank,
            size=place.size,
            local_rank=place.local_rank,
            local_size=place.local_size,
            node_rank=place.node_rank,
            address="" if alone else address,
            port=0 if alone else port,
            restarts=restarts,
            environment=self.name,
            evidence=self.evidence,
            num_nodes=num_nodes,
            max_restarts=max_restarts,
            job=job,
            devices_apart=devices_apart,
        )


def machine_of(rank: int, size: int, local_rank: int, local_size: int) -> int:
    """The number of a machine from the numbers of its process, where nobody tells it.

    Exact where all machines have as many processes, in blocks (``0 1 | 2 3``) or dealt out in turn
    (``0 2 | 1 3``). Otherwise it is a number that differs between machines, and may have gaps.
    """
    if rank % local_size == local_rank:
        return rank // local_size
    machines = -(-size // local_size)
    return rank % machines if rank // machines == local_rank else rank - local_rank
