"""Ranks that torchrun started, and starts again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_toolkit.environments.reading import ADDRESS, PLACE, Reading, facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces.cluster import World

#: Keeps torchrun from handing its own store to the workers, which then meet in one of their own.
OWN_STORE: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

_ELASTIC = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")


@dataclass(frozen=True, slots=True)
class TorchRunEnvironment:
    """Ranks that torchrun started, with its count of restarts.

    The count is that of one machine's agent: after a worker died, other machines may count
    differently. So it is good for a log line, and not for a name that ranks have to agree on.
    """

    name: str = "torchrun"
    priority: int = 90

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """``TORCHELASTIC_RUN_ID``, which torchrun and nobody else sets."""
        return facts(env, _ELASTIC[:1])

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process.

        Raises:
            ClusterError: torchrun's variables are missing or were changed after it set them.
        """
        names = (*PLACE, "GROUP_RANK", "GROUP_WORLD_SIZE", *ADDRESS)
        reading = Reading(self.name, env, facts(env, (*_ELASTIC, *names)))
        if not self.detect(env):
            raise reading.error("TORCHELASTIC_RUN_ID is not set", "Start the script with torchrun.")
        place = reading.place(PLACE, "GROUP_RANK")
        alone = place.size == 1
        return reading.world(
            place,
            "" if alone else reading.address(),
            0 if alone else reading.port(),
            num_nodes=reading.number("GROUP_WORLD_SIZE", least=1, default=0),
            restarts=reading.number("TORCHELASTIC_RESTART_COUNT", default=0),
            max_restarts=reading.number("TORCHELASTIC_MAX_RESTARTS", default=0),
            job=env["TORCHELASTIC_RUN_ID"],
        )

    def remarks(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """A restart that may fail, because old and new workers would meet in one store."""
        restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "")
        if not restarts.isdigit() or int(restarts) == 0 or env.get(OWN_STORE) == "1":
            return ()
        remark = (
            f"torchrun may start these processes {restarts} times more "
            f"(TORCHELASTIC_MAX_RESTARTS={restarts}), and after a failure they may read the "
            "addresses of dead ones in the store that torchrun shares with them: set "
            f"{OWN_STORE}=1 in torchrun's own environment."
        )
        return (remark,)


TORCHRUN: Final = TorchRunEnvironment()
