"""Pods that Kubeflow started: Training Operator v1 (PyTorchJob) and Trainer v2 (TrainJob)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces.cluster import Machines

from drivetrain_toolkit.environments.reading import ADDRESS, LOOPBACK, Place, Reading, facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces.cluster import World

_POD: Final = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
_PER_POD: Final = "PET_NPROC_PER_NODE"
_FIRST: Final = ("RANK", "WORLD_SIZE", *ADDRESS)
_SEEN: Final = (
    *_POD,
    _PER_POD,
    *_FIRST,
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "KUBERNETES_SERVICE_HOST",
)


@dataclass(frozen=True, slots=True)
class KubeflowEnvironment:
    """Processes in the pods of a PyTorchJob or a TrainJob that torchrun did not start.

    The operators describe pods: ``RANK`` of a PyTorchJob and ``PET_NODE_RANK`` of a TrainJob are
    the number of the pod. With one process in each pod that is its rank. With several, each needs
    a ``LOCAL_RANK``; a pod's only process without one is no rank yet, and a launcher starts them.
    """

    name: str = "kubeflow"
    priority: int = 40

    def detect(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """What an operator has set, where it makes this process a rank."""
        names = self._described_by(env)
        if not names:
            return ()
        if self._per_pod(env) != "1" and not env.get("LOCAL_RANK", ""):
            return ()
        return facts(env, (*names, _PER_POD, "LOCAL_RANK"))

    def world(self, env: Mapping[str, str]) -> World:
        """The place of this process.

        Raises:
            ClusterError: Variables are missing or contradict each other.
        """
        reading = Reading(self.name, env, facts(env, _SEEN))
        if not self.detect(env):
            raise reading.error(
                "no pod of a PyTorchJob or TrainJob with a process for each device is described",
                "Start the program with torchrun in each pod, or let a launcher start the "
                "processes.",
            )
        machines = self._machines(reading)
        local_size = machines.local_size or reading.number("LOCAL_WORLD_SIZE", least=1)
        local_rank = reading.number("LOCAL_RANK", default=0)
        if local_rank >= local_size:
            raise reading.contradiction(
                f"LOCAL_RANK={local_rank} is outside the {local_size} processes of a pod"
            )
        place = Place(
            machines.node_rank * local_size + local_rank,
            machines.num_nodes * local_size,
            local_rank,
            local_size,
            machines.node_rank,
        )
        return reading.world(place, machines.address, machines.port, num_nodes=machines.num_nodes)

    def describes_pod(self, env: Mapping[str, str]) -> bool:
        """Whether an operator has described this pod, and this process is no rank yet."""
        return bool(self._described_by(env)) and not self.detect(env)

    def machines(self, env: Mapping[str, str]) -> Machines | None:
        """The pods, where a launcher is to start the processes in each; None where none is told.

        Raises:
            ClusterError: Variables are missing or contradict each other.
        """
        if not self.describes_pod(env):
            return None
        return self._machines(Reading(self.name, env, facts(env, _SEEN)))

    def _described_by(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """The names that describe this pod; empty where no operator did, or torchrun is at work."""
        if env.get("TORCHELASTIC_RUN_ID", ""):
            return ()
        if all(env.get(name, "") for name in _POD):
            return _POD
        pod = env.get("KUBERNETES_SERVICE_HOST", "") and not env.get("LOCAL_WORLD_SIZE", "")
        return _FIRST if pod and all(env.get(name, "") for name in _FIRST) else ()

    def _per_pod(self, env: Mapping[str, str]) -> str:
        return env.get(_PER_POD, "") or "1"

    def _machines(self, reading: Reading) -> Machines:
        env = reading.env
        per_pod = self._per_pod(env)
        # auto, cpu and gpu ask for as many processes as the pod has of them.
        local_size = (
            0 if per_pod in {"auto", "cpu", "gpu"} else reading.number(_PER_POD, least=1, default=1)
        )
        if self._described_by(env) == _POD:
            pods, pod = self._pods(reading), reading.number("PET_NODE_RANK")
            address, port = reading.address("PET_MASTER_ADDR"), reading.port("PET_MASTER_PORT")
        else:
            size, pod = reading.number("WORLD_SIZE", least=1), reading.number("RANK")
            if local_size == 0 or size % local_size:
                raise reading.contradiction(
                    f"WORLD_SIZE={size} is not made of pods with {_PER_POD}={per_pod}"
                )
            pods = size // local_size
            address, port = reading.address(), reading.port()
        if pod >= pods:
            raise reading.contradiction(f"pod {pod} is outside {pods} pods")
        self._check_size(reading, pods, local_size)
        if pods == 1:
            address = LOOPBACK
        return Machines(
            num_nodes=pods,
            node_rank=pod,
            local_size=local_size,
            address=address,
            port=port,
            environment=self.name,
            evidence=reading.evidence,
        )

    def _pods(self, reading: Reading) -> int:
        if ":" in reading.env["PET_NNODES"]:
            raise reading.error(
                f"PET_NNODES={reading.env['PET_NNODES']} lets the number of pods change, which "
                "only torchrun can follow",
                "Start the program with torchrun in each pod.",
            )
        return reading.number("PET_NNODES", least=1)

    def _check_size(self, reading: Reading, pods: int, local_size: int) -> None:
        """``WORLD_SIZE`` of the first operator counts the processes of all pods."""
        told = reading.env.get("WORLD_SIZE", "")
        if told.isdigit() and local_size and int(told) != pods * local_size:
            raise reading.contradiction(
                f"WORLD_SIZE={told}, and {pods} pods with {local_size} processes each make "
                f"{pods * local_size}"
            )


KUBEFLOW: Final = KubeflowEnvironment()
