"""What runs in each process of a crew: it waits for cases, and answers.

Importing this module imports no torch, so that variables can be set before anything reads them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import StrategyContext, SupportsClose, World

from drivetrain_conformance.target import Target, find_target

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch
    from drivetrain_interfaces import (
        Accelerator,
        Backend,
        Collectives,
        Precision,
        Strategy,
        StrategyFactory,
    )


@dataclass(frozen=True, slots=True)
class Order:
    """What the processes of a crew are told when they start.

    Attributes:
        backend: The backend under test, as on the command line.
        strategy: The strategy under test, as on the command line.
        devices: Index of the device of each rank.
        port: Where rank 0 can be reached on this machine.
    """

    backend: str
    strategy: str | None
    devices: tuple[int, ...]
    port: int

    def world(self, rank: int) -> World:
        """The place of one process."""
        size = len(self.devices)
        if size == 1:
            return World()
        return World(rank, size, rank, size, address="127.0.0.1", port=self.port)


@dataclass(slots=True)
class Rank:
    """One process of a world, with the parts of the backend under test.

    Attributes:
        world: Its place.
        target: What is under test.
        backend: The backend, loaded in this process.
        device_index: Of its device.
        made: What has to be closed after a case.
    """

    world: World
    target: Target
    backend: Backend
    device_index: int
    made: list[Any] = field(default_factory=list)
    _accelerator: Accelerator | None = None
    _device: torch.device | None = None
    _collectives: Collectives | None = None

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of this process, activated."""
        if self._accelerator is None:
            import torch

            torch.set_num_threads(1)  # as in the process of the tests
            self._accelerator = self.backend.accelerator()
            self._device = self._accelerator.activate(self.device_index, self.world.local_size)
        return self._accelerator

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        assert self.accelerator
        assert self._device is not None
        return self._device

    @property
    def collectives(self) -> Collectives:
        """The collectives of this process, connected when they are first asked for."""
        assert self.accelerator
        if self._collectives is None:
            self._collectives = self.backend.collectives(self.world)
        return self._collectives

    def disconnect(self) -> None:
        """Close the collectives; whoever asks for them next connects again."""
        if isinstance(self._collectives, SupportsClose):
            self._collectives.close()
        self._collectives = None

    def precision(self, name: str | None = None) -> Precision:
        """A precision, by default the one for tests that are not about precision."""
        from drivetrain_conformance.fixtures import usual_precision

        return self.backend.precision(name or usual_precision(self.target))

    def bind(
        self, name: str, precision: Precision | None = None, *, sync_batchnorm: bool = False
    ) -> Strategy:
        """A strategy that is bound to this process until the case ends."""
        context = self._context(precision or self.precision(), sync_batchnorm=sync_batchnorm)
        strategy = self.target.make_strategy(self.backend, name, context)
        self.made.append(strategy)
        return strategy

    def bind_object(
        self, factory: StrategyFactory, precision: Precision | str = "32-true"
    ) -> Strategy:
        """A strategy object, bound to this process until the case ends: for a package's own tests.

        Args:
            factory: A configured strategy object, or what a spec's ``load`` returns.
            precision: A precision, or the name of one of the backend's.
        """
        made = self.precision(precision) if isinstance(precision, str) else precision
        strategy = factory(self._context(made, sync_batchnorm=False))
        self.made.append(strategy)
        return strategy

    def _context(self, precision: Precision, *, sync_batchnorm: bool) -> StrategyContext:
        return StrategyContext(
            accelerator=self.accelerator,
            device_index=self.device_index,
            world=self.world,
            collectives=self.collectives,
            precision=precision,
            sync_batchnorm=sync_batchnorm,
        )

    def tidy(self) -> None:
        """Close what a case made. The accelerator stays active for the next one."""
        while self.made:
            self.made.pop().close()
        if self._accelerator is not None:
            self._device = self._accelerator.activate(self.device_index, self.world.local_size)

    def run(self, case: str, arguments: dict[str, Any]) -> Any:
        """Run ``module:function`` with this rank as its first argument."""
        module, _, name = case.partition(":")
        try:
            return getattr(importlib.import_module(module), name)(self, **arguments)
        finally:
            self.tidy()


def make_rank(order: Order, rank: int) -> Rank:
    """One process's parts."""
    target = find_target(order.backend, order.strategy)
    return Rank(order.world(rank), target, target.spec.load(), order.devices[rank])


def serve(connection: Connection, order: Order, rank: int) -> None:
    """The main function of a process: answers cases until it is told to stop."""
    world = order.world(rank)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world.size),
        NODE_RANK="0",
        MASTER_ADDR=world.address,
        MASTER_PORT=str(world.port),
    )
    mine = make_rank(order, rank)
    while True:
        try:
            case, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301 - from our parent
        except EOFError:  # the parent has ended
            return
        if case is None:
            mine.disconnect()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # taking torch apart takes longer than many a test
        connection.send_bytes(_answer(mine, case, arguments))


def _answer(mine: Rank, case: str, arguments: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps((True, mine.run(case, arguments)))
    except Exception:  # noqa: BLE001 - the parent reports it
        return pickle.dumps((False, traceback.format_exc()))
