"""Several TPU machines that make one slice (a pod), and processes that have a chip each.

Google's machines and containers say which of them this is by ``TPU_WORKER_ID`` and
``TPU_WORKER_HOSTNAMES``. A process with a chip of its own has the variables that libtpu reads, and
torch_xla sets (``torch_xla/_internal/tpu.py`` of torch_xla 2.9, ``configure_topology``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import Machines
from drivetrain_toolkit.environments.reading import (
    ADDRESS,
    LOOPBACK,
    Place,
    Reading,
    facts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import World

_PROCESS: Final = (
    "CLOUD_TPU_TASK_ID",
    "TPU_PROCESS_ADDRESSES",
    "PJRT_LOCAL_PROCESS_RANK",
    "PJRT_LOCAL_PROCESS_COUNT",
)
_WORKER: Final = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
#: The port at which ranks of ``xla://`` meet unless ``MASTER_PORT`` says otherwise (torch_xla 2.9).
_PORT: Final = 12355


@dataclass(frozen=True, slots=True)
class TpuEnvironment:
    """A machine of a TPU slice; or one process of several, each of which has one chip."""

    name: str = "tpu"
    priority: int = 45

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The variables of a process that has a chip of its own."""
        found = facts(env, _PROCESS)
        return found if len(found) == len(_PROCESS) else ()

    def world(self, env: Mapping[str, str]) -> World:
        """The place of a process that has a chip of its own.

        Raises:
            ClusterError: Variables are missing or contradict each other.
        """
        reading = Reading(self.name, env, facts(env, (*_PROCESS, *_WORKER, *ADDRESS)))
        local_rank = reading.number("PJRT_LOCAL_PROCESS_RANK")
        local_size = reading.number("PJRT_LOCAL_PROCESS_COUNT", least=1)
        rank = reading.number("CLOUD_TPU_TASK_ID")
        addresses = [part.strip() for part in reading.text("TPU_PROCESS_ADDRESSES").split(",")]
        size = len(addresses)
        if size % local_size or rank >= size or rank % local_size != local_rank:
            raise reading.contradiction(
                f"process {rank} (number {local_rank} of {local_size} on its machine) is none of "
                f"the {size} in TPU_PROCESS_ADDRESSES, machine by machine"
            )
        place = Place(rank, size, local_rank, local_size, rank // local_size)
        first = addresses[0].rpartition(":")[0] or addresses[0]
        return reading.world(
            place,
            _address(env, LOOPBACK if local_size == size else first),
            _port(reading),
            num_nodes=size // local_size,
        )

    def machines(self, env: Mapping[str, str]) -> Machines | None:
        """The machines of the slice; None for a single one, and for a process with its own chip.

        Raises:
            ClusterError: Variables are missing or contradict each other.
        """
        hosts = [part.strip() for part in env.get("TPU_WORKER_HOSTNAMES", "").split(",")]
        if len(hosts) < 2 or self.detect(env):  # noqa: PLR2004 - one machine has nobody to meet
            return None
        reading = Reading(self.name, env, facts(env, (*_WORKER, *ADDRESS)))
        worker = reading.number("TPU_WORKER_ID")
        if worker >= len(hosts):
            raise reading.contradiction(
                f"TPU_WORKER_ID={worker} is none of the {len(hosts)} machines"
            )
        return Machines(
            num_nodes=len(hosts),
            node_rank=worker,
            address=_address(env, hosts[0]),
            port=_port(reading),
            environment=self.name,
            evidence=reading.evidence,
        )


def _address(env: Mapping[str, str], told: str) -> str:
    return env.get("MASTER_ADDR", "") or told


def _port(reading: Reading) -> int:
    return reading.port() if reading.env.get("MASTER_PORT", "") else _PORT


TPU: Final = TpuEnvironment()
