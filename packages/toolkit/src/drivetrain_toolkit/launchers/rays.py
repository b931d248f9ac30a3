"""The ray launcher: ranks are actors of an existing Ray cluster, in one placement group."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces.cluster import World
from drivetrain_interfaces.errors import ClusterError, NotFoundError, ProcessFailedError
from drivetrain_interfaces.launcher import LaunchPlan

from drivetrain_toolkit.launchers.pickles import pickled_by_value, pickled_result, unpickled
from drivetrain_toolkit.launchers.plans import place
from drivetrain_toolkit.launchers.sending import SendingLauncher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces.launcher import LaunchRequest


class RayLauncher(SendingLauncher):
    """Runs each rank as an actor of Ray, with the resources that it needs.

    The cluster is one that runs already. Each machine of the run is one bundle of a placement
    group, so ranks that share a machine in the plan do so in Ray. What ranks print comes back
    through Ray.

    Args:
        resources: What one rank needs, such as ``{"CPU": 4, "GPU": 1}``; one CPU by default. With
            devices of its own a rank sees only these.
        address: The cluster; ``"auto"`` is the one of this machine or of ``RAY_ADDRESS``.
        timeout: Seconds in which the cluster must have room for all ranks.
    """

    name = "ray"

    def __init__(
        self,
        resources: Mapping[str, float] | None = None,
        address: str = "auto",
        timeout: float = 300.0,
    ) -> None:
        self.resources = dict(resources or {"CPU": 1.0})
        self.address = address
        self.timeout = timeout
        self._nodes = self._local_size = 1

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """What is asked of Ray. It lists no worlds: Ray decides who runs where.

        Raises:
            ClusterError: The request cannot be met, or this process is a rank already.
            NotFoundError: Ray or cloudpickle is not installed.
        """
        self._check(request)
        _ray()
        self._nodes, self._local_size = request.num_nodes, request.local_size
        return LaunchPlan(self.name, ())

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Have ``main`` run in every actor, wait, and return what rank 0 returned, by pickle.

        Raises:
            ClusterError: There is no cluster, or it has no room for all ranks.
            ProcessFailedError: A rank failed. All actors have ended.
            UserCodeError: ``main`` or its result cannot be pickled.
        """
        task = pickled_by_value(main, self.name)
        ray = _ray()
        mine = not ray.is_initialized()
        if mine:
            self._connect(ray)
        group = import_module("ray.util.placement_group").placement_group(
            [{key: value * self._local_size for key, value in self.resources.items()}]
            * self._nodes,
            strategy="STRICT_SPREAD" if self._nodes > 1 else "STRICT_PACK",
        )
        actors: list[Any] = []
        try:
            if not group.wait(self.timeout):
                raise ClusterError(
                    f"The 'ray' launcher asked for {self._nodes} machines with "
                    f"{self._local_size} × {self.resources} each, and the cluster had no room for "
                    f"them in {self.timeout:g} seconds; it has {ray.cluster_resources()}.",
                    "Ask for less, wait for other jobs, or add machines to the cluster.",
                )
            actors += self._actors(ray, group)
            return self._result(ray, actors, task)
        finally:
            for actor in actors:
                ray.kill(actor)
            import_module("ray.util.placement_group").remove_placement_group(group)
            if mine:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        try:
            ray.init(address=self.address, log_to_driver=True)
        except ConnectionError as error:
            raise ClusterError(
                f"The 'ray' launcher was to join the cluster at {self.address!r}, and there is "
                f"none: {error}.",
                "Start one with 'ray start --head', or pass its address: RayLauncher(address=...).",
            ) from error

    def _actors(self, ray: Any, group: Any) -> list[Any]:
        scheduling = import_module("ray.util.scheduling_strategies")
        amounts = dict(self.resources)
        cpus, gpus = amounts.pop("CPU", 0), amounts.pop("GPU", 0)
        kind = ray.remote(_Rank)
        return [
            kind.options(
                num_cpus=cpus,
                num_gpus=gpus,
                resources=amounts or None,
                scheduling_strategy=scheduling.PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=node
                ),
            ).remote(list(sys.path))
            for node in range(self._nodes)
            for _ in range(self._local_size)
        ]

    def _result(self, ray: Any, actors: list[Any], task: bytes) -> Any:
        address, port = ray.get(actors[0].meeting_point.remote())
        size = len(actors)
        apart = any(key != "CPU" for key in self.resources)
        waiting = {
            actor.run.remote(
                task,
                World(
                    rank=rank,
                    size=size,
                    local_rank=rank % self._local_size,
                    local_size=self._local_size,
                    node_rank=rank // self._local_size,
                    address=address if size > 1 else "",
                    port=port if size > 1 else 0,
                    environment="ray",
                    evidence=("an actor of the 'ray' launcher",),
                    num_nodes=self._nodes,
                    devices_apart=apart,
                ),
            ): rank
            for rank, actor in enumerate(actors)
        }
        result = None
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            rank = waiting.pop(done)
            answer = self._answer(ray, done, rank, size)
            result = answer if rank == 0 else result
        return unpickled(result, "The result of rank 0") if result is not None else None

    def _answer(self, ray: Any, done: Any, rank: int, size: int) -> bytes | None:
        try:
            error, data = ray.get(done)
        except ray.exceptions.RayError as gone:
            raise ProcessFailedError(
                f"A run of {size} processes was ended, because Ray lost rank {rank}: {gone}",
                "Look in Ray's log of that actor.",
            ) from gone
        if error:
            raise ProcessFailedError(
                f"A run of {size} processes was ended, because rank {rank} {error}",
                f"Correct the error of rank {rank} first.",
            )
        answer: bytes | None = data
        return answer


class _Rank:
    """One rank, inside an actor."""

    def __init__(self, path: list[str]) -> None:
        sys.path[:] = [*path, *(each for each in sys.path if each not in path)]

    def meeting_point(self) -> tuple[str, int]:
        """A host and port at which the others can reach this rank."""
        import socket

        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("", 0))
            port: int = free.getsockname()[1]
        return str(import_module("ray.util").get_node_ip_address()), port

    def run(self, task: bytes, world: World) -> tuple[str, bytes | None]:
        """Call the task; what it raised as text, and rank 0's result."""
        import os

        os.environ.update(place(world, RayLauncher.name))
        try:
            result = unpickled(task, "main")(world)
            return "", pickled_result(result, by_value=True) if world.is_main else None
        except Exception as error:  # noqa: BLE001 - told by the launcher, which raises it
            text = f"raised {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
            return text, None


def _ray() -> Any:
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise NotFoundError(
            "The 'ray' launcher was asked for, and Ray is not installed.",
            "Install drivetrain-toolkit[ray].",
        ) from error
