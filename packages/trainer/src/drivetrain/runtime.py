"""The resolved stack: who runs where on what. The Trainer is built on it; own loops can be."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import (
    Accelerator,
    Clip,
    LaunchRequest,
    ManualSpec,
    ModelState,
    RunsInPlace,
    StepSpec,
    StrategyContext,
    SupportsClose,
    SupportsManualStep,
    UnsupportedError,
    World,
    refuse_what_is_newer,
)
from drivetrain_interfaces.discovery import LAUNCHERS, load

from drivetrain.data import feed_of
from drivetrain.plan import Request
from drivetrain.resolve import resolve
from drivetrain.seeding import data_seed, host_rng_state, set_host_rng_state
from drivetrain.survey import survey

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from drivetrain_interfaces import (
        CheckpointIO,
        Collectives,
        Launcher,
        ManualStep,
        Precision,
        Strategy,
        TrainStep,
    )
    from torch import nn

    from drivetrain.feeds import Feed
    from drivetrain.plan import Parts, Plan

#: Connections of this process by backend and place: rendezvous again would race with other ranks.
_CONNECTED: dict[tuple[str, World], Collectives] = {}


@dataclass(frozen=True)
class Stack:
    """The live parts of one process."""

    world: World
    accelerator: Accelerator
    collectives: Collectives
    precision: Precision
    strategy: Strategy
    checkpoint_io: CheckpointIO


class Runtime:
    """Resolves what to run on, starts the processes, and holds the parts in each of them.

    Arguments are those of ``Trainer``. Everything about the choice is in ``plan``.

    Raises:
        ConfigurationError: Settings that cannot be met; the message lists all of them.
    """

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        strategy: Any = "auto",
        precision: Any = None,
        launcher: Any = "auto",
        cluster_environment: Any = "auto",
        plugins: Sequence[Any] = (),
        gpus: Any = None,
        sync_batchnorm: bool = False,
        wants: tuple[Any, ...] = (),
    ) -> None:
        request = Request(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
            launcher=launcher,
            cluster_environment=cluster_environment,
            plugins=tuple(plugins),
            gpus=gpus,
            sync_batchnorm=sync_batchnorm,
            wants=wants,
        )
        resolution = resolve(request, survey(request, os.environ))
        self.plan: Plan = resolution.plan
        self.parts: Parts = resolution.parts
        self._stack: Stack | None = None
        self._world: World | None = None
        self._manual: ManualStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stack": None, "_manual": None}  # rebuilt in each process

    # Processes
    def launch(
        self, main: Callable[..., Any], *args: Any, ahead: Callable[[], Any] | None = None
    ) -> Any:
        """Run ``main(runtime, *args)`` in every process of the plan.

        Args:
            main: What each process runs, once all of them have met.
            args: More of its arguments.
            ahead: What each of several processes does before they meet, such as slow imports: the
                first does it while the others start.

        Returns:
            The result in this process, or rank 0's where this process only supervises.
        """
        job = _Job(self, main, args, ahead)
        if self.plan.launcher == "none":
            return job(World())
        if self.plan.launcher == "attach" and self.parts.environment is not None:
            return job(self.parts.environment.world(os.environ))
        launcher = self.launcher()
        if not self.in_place:
            # Children draw the same random numbers as this process would have.
            job = replace(job, rng=host_rng_state())
        request = LaunchRequest(
            local_size=self.plan.local_size,
            num_nodes=self.plan.num_nodes,
            node_rank=self.plan.node_rank,
            address=self.plan.address,
            port=self.plan.port,
        )
        return launcher.launch(job, launcher.plan(request))

    def launcher(self) -> Launcher:
        """The launcher of the plan: the user's own, the backend's, or the shared one."""
        if self.parts.launcher is not None:
            return self.parts.launcher
        own = self.parts.spec.load().launcher(self.plan.launcher)
        if own is not None:
            return own
        made: Launcher = load(LAUNCHERS, self.plan.launcher, object, what="launcher")()  # type: ignore[operator]  # a factory by the group's contract
        return made

    @property
    def in_place(self) -> bool:
        """Whether rank 0 is the calling process, so that its objects keep their state."""
        if self.plan.launcher in {"none", "attach"}:
            return True
        launcher = self.launcher()
        return isinstance(launcher, RunsInPlace) and launcher.in_place

    def open(self, world: World) -> Stack:
        """Build the parts of this process. Called by ``launch``; twice gives the same parts."""
        if self._stack is not None and self._stack.world == world:
            return self._stack
        self._world = world
        plan, parts = self.plan, self.parts
        backend = parts.spec.load()
        accelerator = parts.accelerator or backend.accelerator()
        index = plan.devices[world.local_rank % len(plan.devices)]
        accelerator.activate(index, world.local_size)
        precision = parts.precision or backend.precision(plan.precision)
        collectives = _connect(plan.backend, world, backend.collectives)
        strategy = parts.strategy_factory(
            StrategyContext(
                accelerator=accelerator,
                device_index=index,
                world=world,
                collectives=collectives,
                precision=precision,
                sync_batchnorm=plan.sync_batchnorm,
                options=dict(plan.options),
                devices=plan.devices,
            )
        )
        checkpoint_io = parts.checkpoint_io or backend.checkpoint_io()
        self._stack = Stack(world, accelerator, collectives, precision, strategy, checkpoint_io)
        return self._stack

    def adopt(self, world: World) -> None:
        """Stand for rank 0 in the process that started it, once its run is over."""
        self._world = world

    def close(self) -> None:
        """Release the strategy and the device. Connections stay until the process ends."""
        if self._stack is not None:
            self._stack.strategy.close()
            self._stack.accelerator.close()
            self._stack = None
            self._manual = None

    @property
    def stack(self) -> Stack:
        """The parts of this process. Raises ``UnsupportedError`` outside ``launch``."""
        if self._stack is None:
            raise UnsupportedError(
                "The parts of a Runtime were asked for in a process that it has not opened.",
                "Use them in the function that you pass to Runtime.launch.",
            )
        return self._stack

    @property
    def world(self) -> World:
        """This process's place; known once the processes were up, also after ``close``."""
        return self.stack.world if self._world is None else self._world

    @property
    def device(self) -> torch.device:
        """Where batches of this process go."""
        return self.stack.strategy.device

    # Own loops
    def setup(
        self, module: nn.Module, *optimizers: Any
    ) -> tuple[ManualStep, list[torch.optim.Optimizer]]:
        """Place a module for a loop of your own.

        Args:
            module: The network; converted and moved.
            optimizers: Functions from parameters to an optimizer, called once the module is placed.

        Returns:
            A callable that runs the module's forward in the chosen precision, and the optimizers.

        Raises:
            UnsupportedError: The strategy owns the whole step; use ``train_step``.
        """
        strategy = self.stack.strategy
        if not isinstance(strategy, SupportsManualStep):
            raise UnsupportedError(
                f"The strategy {self.plan.strategy!r} owns the whole step and offers no separate "
                "backward.",
                "Use Runtime.train_step.",
            )
        placed = strategy.prepare(module)
        made = [make(placed.parameters()) for make in optimizers]
        self._manual = strategy.manual_step(ManualSpec(placed, made, _forward))
        return self._manual, made

    def train_step(
        self,
        module: nn.Module,
        optimizers: Sequence[Callable[..., torch.optim.Optimizer]],
        loss: Callable[[nn.Module, Any], torch.Tensor],
        *,
        accumulate: int = 1,
        clip: Clip | None = None,
    ) -> tuple[TrainStep, list[torch.optim.Optimizer]]:
        """Forward, backward and update as one call, on any strategy.

        Args:
            module: The network; converted and moved.
            optimizers: Functions from parameters to an optimizer.
            loss: Called with the module and a batch; returns the loss.
            accumulate: Microbatches per update.
            clip: Gradient clipping.
        """
        placed = self.stack.strategy.prepare(module)
        made = [make(placed.parameters()) for make in optimizers]
        spec = StepSpec(placed, made, loss, accumulate=accumulate, clip=clip)
        refuse_what_is_newer(spec, self.plan.owner, self.parts.spec.contract)
        return self.stack.strategy.train_step(spec), made

    def loader(self, loader: Any, *, training: bool = True) -> Feed:
        """The loader with this rank's part of the samples; iterate ``feed.open(epoch)``."""
        return feed_of(
            loader,
            self.world,
            seed=self.stack.collectives.broadcast_object(data_seed()),
            training=training,
            distribute=True,
            name="loader",
        )

    def feed(self, batch: Any) -> Any:
        """The batch on the device."""
        return self.stack.strategy.feed(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate, scaled if the precision needs it. After ``setup``."""
        self._own().backward(loss)

    def step(self, optimizer: torch.optim.Optimizer, clip: Clip | None = None) -> bool:
        """Average gradients over ranks, unscale, clip, update and clear; whether it was applied."""
        result = self._own().update(optimizer, clip)
        optimizer.zero_grad(set_to_none=True)
        return result is None or result.applied

    def _own(self) -> ManualStep:
        if self._manual is None:
            raise UnsupportedError(
                "Runtime.backward or Runtime.step was called before Runtime.setup.",
                "Call setup with the module and its optimizers first.",
            )
        return self._manual

    def save(self, path: str, **extra: Any) -> None:
        """Save module, optimizers and whatever else is given. Every rank calls it."""
        from drivetrain.sharing import state_of
        from drivetrain.snapshot import write_checkpoint

        state = state_of(self.stack)
        tree = {
            "module": dict(state.module),
            "optimizers": list(state.optimizers),
            "precision": dict(state.precision),
            "user": extra,
        }
        write_checkpoint(tree, path, self.stack)

    def load(self, path: str) -> dict[str, Any]:
        """Restore what ``save`` wrote, on any number of ranks; returns what was given as extra."""
        from drivetrain.sharing import load_into
        from drivetrain.snapshot import open_checkpoint

        tree = open_checkpoint(path, self.stack)
        state = ModelState(tree["module"], tree.get("optimizers", ()), tree.get("precision", {}))
        load_into(self.stack, state)
        extra: dict[str, Any] = tree.get("user", {})
        return extra


@dataclass(frozen=True)
class _Job:
    """What runs in each process; an object rather than a closure, so that it pickles."""

    runtime: Runtime
    main: Callable[..., Any]
    args: tuple[Any, ...]
    ahead: Callable[[], Any] | None = None
    rng: dict[str, Any] | None = None

    def __call__(self, world: World) -> Any:
        if self.rng is not None:
            set_host_rng_state(self.rng)
        if self.ahead is not None and world.size > 1:
            self.ahead()
        self.runtime.open(world)
        return self.main(self.runtime, *self.args)


def _forward(module: nn.Module, *args: Any) -> Any:
    return module(*args)


def _connect(backend: str, world: World, connect: Callable[[World], Collectives]) -> Collectives:
    key = (backend, world)
    if key not in _CONNECTED:
        _CONNECTED[key] = connect(world)
    return _CONNECTED[key]


@atexit.register
def _disconnect() -> None:
    for collectives in _CONNECTED.values():
        if isinstance(collectives, SupportsClose):
            collectives.close()
    _CONNECTED.clear()
