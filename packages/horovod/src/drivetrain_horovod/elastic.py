"""Training that goes on when hosts come and go, by Horovod's elastic runs over gloo.

A run has no trainer: the number of ranks changes under it, and with it the step. It is started by
``horovodrun --min-np 1 --host-discovery-script hosts.sh``, or ``horovod.run`` with the like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError, StrategyContext, World
from drivetrain_interfaces.discovery import load_backend

from drivetrain_horovod.collectives import HorovodCollectives, forget_subgroups
from drivetrain_horovod.starting import import_horovod
from drivetrain_horovod.strategy import HorovodStrategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import ModelState, StepSpec, TrainStep

import_horovod()
from horovod.common.elastic import ObjectState  # noqa: E402 - said by name if it is missing


class ElasticState(ObjectState):  # type: ignore[misc]  # it has no types
    """What an elastic run has: its step, and values that all ranks agree on.

    Values are attributes. ``commit()`` keeps all of it; after a change of the hosts every rank goes
    on from what was kept last, with a step for the ranks that there are then.

    Args:
        build: Called once in each process with the bound strategy; prepares the module with it and
            returns what to train.
        strategy: The strategy, not bound.
        backend: The name of the backend.
        precision: The name of the precision.
        values: Such as ``epoch=0``.
    """

    def __init__(
        self,
        build: Callable[[HorovodStrategy], StepSpec],
        *,
        strategy: HorovodStrategy | None = None,
        backend: str = "cpu",
        precision: str = "32-true",
        **values: Any,
    ) -> None:
        self._hvd = import_horovod()
        self._build = build
        self._unbound = strategy or HorovodStrategy()
        self._backend = load_backend(backend).load()
        self._precision = precision
        self._kept: ModelState | None = None
        self._spec: StepSpec | None = None
        self._fits = False
        self.strategy: HorovodStrategy | None = None
        self._step: TrainStep | None = None
        taken = sorted(values.keys() & {*dir(type(self)), *vars(self)})
        if taken:
            raise ConfigurationError(
                f"An elastic run was given values named {taken}, which are its own.",
                "Name them otherwise.",
            )
        super().__init__(bcast_object=self._hvd.broadcast_object, get_rank=self._hvd.rank, **values)

    @property
    def world(self) -> World:
        """The place of this process now."""
        hvd = self._hvd
        return World(
            rank=hvd.rank(),
            size=hvd.size(),
            local_rank=hvd.local_rank(),
            local_size=hvd.local_size(),
            node_rank=hvd.cross_rank(),
            address="127.0.0.1",
            port=1,  # nothing but Horovod connects these ranks
            environment="horovod",
        )

    @property
    def step(self) -> TrainStep:
        """The train step for the ranks that there are now."""
        assert self._step is not None, "run_elastic builds it"
        return self._step

    def save(self) -> None:
        """Keep the model, the optimizers and the values in host memory."""
        if self.strategy is not None:
            self._kept = self.strategy.state()
        super().save()

    def restore(self) -> None:
        """Go back to what was kept."""
        if self.strategy is not None and self._kept is not None:
            self.strategy.load(self._kept)
        super().restore()

    def reset(self) -> None:
        """There are other ranks now: the step does not fit them."""
        self._fits = False

    def sync(self) -> None:
        """Build the step for these ranks, and take over what rank 0 has; every rank calls it."""
        before = None if self.strategy is None else self.strategy.state()
        if self.strategy is not None:
            self.strategy.close()
        forget_subgroups()
        accelerator = self._backend.accelerator()
        self.strategy = self._unbound(
            StrategyContext(
                accelerator=accelerator,
                device_index=self.world.local_rank if accelerator.facts.indexed else 0,
                world=self.world,
                collectives=HorovodCollectives(self._hvd),
                precision=self._backend.precision(self._precision),
            )
        )
        if self._spec is None:
            self._spec = self._build(self.strategy)
        else:
            self.strategy.prepare(self._spec.module)
        self._step = self.strategy.train_step(self._spec)
        mine = before or self.strategy.state()
        self.strategy.load(self._bcast_object(mine))
        super().sync()
        self._fits = True
        self.save()

    def refit(self) -> None:
        """Build the step again where Horovod saw no reason to bring ranks together."""
        if not self._fits:
            self.sync()


def run_elastic(
    train: Callable[[ElasticState], Any],
    build: Callable[[HorovodStrategy], StepSpec],
    **settings: Any,
) -> Any:
    """Train while hosts come and go; returns what ``train`` returned.

    Args:
        train: Called with the state, and again after each change of the ranks; goes on from its
            values, and calls ``state.commit()`` where it may begin again.
        build: See ``ElasticState``.
        settings: Of ``ElasticState``.

    Raises:
        ConfigurationError: A value has a name that the state needs.
    """
    hvd = import_horovod()
    hvd.init()

    def fitted(state: ElasticState) -> Any:
        state.refit()
        return train(state)

    return hvd.elastic.run(fitted)(ElasticState(build, **settings))
