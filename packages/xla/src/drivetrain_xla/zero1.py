"""Optimizer state divided over processes; parameters and gradients whole on each (ZeRO stage 1)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from drivetrain_interfaces import ConfigurationError
from drivetrain_toolkit.owners import gather_state, own_state, restore_state, update_of

from drivetrain_xla import CAPABILITIES
from drivetrain_xla.replicas import ReplicaStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces import ManualSpec, ManualStep, ModelState, StepSpec, TrainStep
    from drivetrain_toolkit.steps import Update
    from torch import Tensor
    from torch.optim import Optimizer

    Exchange = Callable[[Sequence[Tensor], int], None]


class Zero1ReplicaStrategy(ReplicaStrategy):
    """As ``ReplicaStrategy``; each rank updates some parameters, and sends them to the others.

    An optimizer holds state for the parameters of its rank only. Parameters are dealt out whole,
    the largest first, so that ranks hold about as many numbers each.

    Args:
        compile_step: As in ``ReplicaStrategy``.
        max_graphs: As in ``XlaStrategy``.
    """

    name = "zero1"
    capabilities: ClassVar = CAPABILITIES["zero1"]

    _divided: tuple[_Divided, ...] = ()

    def train_step(self, spec: StepSpec) -> TrainStep:
        """As for ``ReplicaStrategy``. Raises ``UnsupportedError`` if an optimizer needs a closure.

        Raises:
            UnsupportedError: See above.
        """
        self._refuse_closures(spec)
        self._divided = ()
        return super().train_step(spec)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        del spec
        self._refuse_manual()

    def state(self) -> ModelState:
        """The whole state on rank 0; the others help, and return an empty one."""
        if not self._divided:
            return super().state()
        torch_xla.sync()
        return gather_state(self._divided, self._prepared(), self.context)

    def sharded_state(self) -> ModelState:
        """The module, and the optimizer states that this rank has; nothing is sent."""
        if not self._divided:
            return super().state()
        torch_xla.sync()
        return own_state(self._divided, self._prepared(), self.context.precision)

    def load_sharded(self, state: ModelState, *, strict: bool = True) -> None:
        """As ``load``, of stored tensors; the states of others' parameters are not read."""
        self.load(state, strict=strict)

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any strategy and world; each rank keeps what it updates.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        if not self._divided:
            super().load(state, strict=strict)
            return
        precision = self.context.precision
        restore_state(self._divided, self._prepared(), precision, state, strict=strict)
        torch_xla.sync()

    def close(self) -> None:
        """Forget which rank updates what, and release the device."""
        self._divided = ()
        super().close()

    def _update(self, spec: StepSpec) -> Update:
        world, collectives = self.context.world, self.context.collectives
        exchange: Exchange
        if self._in_graph:
            told = collectives.all_gather(torch.tensor([xr.global_ordinal()]))
            exchange = partial(_send_in_graph, [int(each) for each in told])
        else:
            exchange = partial(_send_by_hosts, collectives)
        self._divided = tuple(
            _Divided(each, world.rank, world.size, exchange) for each in spec.optimizers
        )
        return update_of(self._divided, self.context.precision)


class _Divided:
    """An optimizer whose step updates this rank's parameters, and exchanges all."""

    def __init__(self, optimizer: Optimizer, rank: int, size: int, exchange: Exchange) -> None:
        self.optimizer = optimizer
        self._exchange = exchange
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._owners = dealt_out(parameters, size)
        self._of = [[p for p in parameters if self.owner(p) == each] for each in range(size)]
        self._owned = self._of[rank]
        self._mine = {id(p) for p in self._owned}

    def owner(self, parameter: Tensor) -> int:
        """The rank that updates a parameter."""
        return self._owners[id(parameter)]

    def owned(self) -> Sequence[Tensor]:
        """The parameters that this rank updates."""
        return self._owned

    def step(self) -> None:
        """Update this rank's parameters and exchange all."""
        whole = self.optimizer.param_groups
        if sum(len(group["params"]) for group in whole) != len(self._owners):
            raise ConfigurationError(
                f"A parameter was added to a {type(self.optimizer).__name__} after the train step "
                "of the strategy 'zero1' was built, so that no rank would update it.",
                "Add it in configure_optimizers, frozen if need be.",
            )
        mine = [
            {**group, "params": [p for p in group["params"] if id(p) in self._mine]}
            for group in whole
        ]
        # Ranks update other parameters, so that their graphs differ here, and XLA's collectives
        # want equal ones: no graph may hold both.
        torch_xla.sync()
        self.optimizer.param_groups = [group for group in mine if group["params"]]
        try:
            if self.optimizer.param_groups:
                self.optimizer.step()
        finally:
            self.optimizer.param_groups = whole
        torch_xla.sync()
        for rank, parameters in enumerate(self._of):
            if parameters:
                self._exchange(parameters, rank)


def dealt_out(parameters: Sequence[Tensor], size: int) -> dict[int, int]:
    """For each parameter, by ``id``, the rank that updates it."""
    loads = [0] * size
    owners: dict[int, int] = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        rank = loads.index(min(loads))
        owners[id(parameter)] = rank
        loads[rank] += parameter.numel()
    return owners


def _send_by_hosts(collectives: Any, parameters: Sequence[Tensor], source: int) -> None:
    with torch.no_grad():
        for kind in dict.fromkeys(p.dtype for p in parameters):  # in one order on all ranks
            group = [p for p in parameters if p.dtype == kind]
            flat = torch.cat([p.detach().reshape(-1) for p in group])
            flat = collectives.broadcast(flat, source)
            for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.copy_(part.view_as(p))


def _send_in_graph(ordinals: Sequence[int], parameters: Sequence[Tensor], source: int) -> None:
    with torch.no_grad():
        xm.collective_broadcast([p.data for p in parameters], root_ordinal=ordinals[source])
