"""Parameters, gradients and optimizer state divided over processes, by torch_xla's own FSDP (v1).

Each parameter is divided along its first dimension. ``XlaFullyShardedDataParallel`` puts parts of
its own in the place of a module's parameters; here they get the names of these, so that optimizers,
checkpoints and users find them where they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from drivetrain_interfaces import CheckpointError, ModelState, Shard, StoredTensor, UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.clipping import gradients
from drivetrain_toolkit.state import (
    gather_module,
    gather_optimizer,
    restore_module,
    restore_optimizers,
)
from drivetrain_toolkit.strategies.eager import WholeEvalStep
from torch import Tensor, nn
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

from drivetrain_xla import CAPABILITIES, PRECISIONS
from drivetrain_xla.replicas import ReplicaStrategy
from drivetrain_xla.steps import XlaEvalStep, XlaTrainStep
from drivetrain_xla.strategies import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        StepSpec,
        StrategyContext,
        TrainStep,
    )
    from torch.optim import Optimizer
    from typing_extensions import Self


class ShardedReplicaStrategy(ReplicaStrategy):
    """One of several processes, each with a part of every parameter.

    A step gathers the parameters once, all together, and leaves each process its part of the
    gradients. Ranks must be known to XLA's runtime, as on TPUs. In a world of one nothing is
    divided.

    Args:
        compile_step: As in ``ReplicaStrategy``.
        max_graphs: As in ``XlaStrategy``.
    """

    name = "fsdp1"
    capabilities: ClassVar = CAPABILITIES["fsdp1"]

    #: Ranks from which on there is something to divide.
    _least: ClassVar[int] = 2
    _parts: Parts | None = None
    _order: list[int]

    def __call__(self, context: StrategyContext) -> Self:
        """A bound copy. Opens the runtime.

        Raises:
            UnsupportedError: XLA's runtime does not know the other processes, or the precision is
                one that it does not declare.
            UnavailableError: The runtime does not open.
        """
        if context.precision.name in PRECISIONS - self.capabilities.precisions:
            raise UnsupportedError(
                f"The strategy {self.name!r} was asked for with precision "
                f"{context.precision.name!r}, and it holds float32.",
                f"Use one of: {listed(self.capabilities.precisions)}.",
            )
        strategy = super().__call__(context)
        if context.world.size > 1 and not strategy._in_graph:  # noqa: SLF001 - our own copy
            raise UnsupportedError(
                f"The strategy {self.name!r} was asked for in a world of {context.world.size} "
                "processes which XLA's runtime does not know, as that for CPUs never does: "
                "XlaFullyShardedDataParallel would take each for a world of one.",
                "Use strategy='zero1', or 'fsdp' in one process.",
            )
        return strategy

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move, take over rank 0's values, and divide, in place.

        Raises:
            UnsupportedError: A parameter or buffer is not float32, or a parameter is one number.
        """
        self._make_whole(module)
        if self.context.world.size < self._least:
            return super().prepare(module)
        _refuse_kinds(module)
        module = super().prepare(module)
        _renew(module)
        self._parts = vars(module)[PARTS] = Parts(module)
        # Ranks of XLA's runtime need not be those of the hosts.
        told = self.context.collectives.all_gather(torch.tensor([self._parts.rank]))
        self._order = sorted(range(len(told)), key=lambda rank: int(told[rank]))
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            ConfigurationError: An optimizer was built before ``prepare``.
            UnsupportedError: An optimizer is fused, or needs a closure.
        """
        self._refuse_closures(spec)
        if self._parts is None:
            return super().train_step(spec)
        self._refuse_foreign(spec)
        self._take(spec.optimizers)
        context, options = self.context, self._options
        return XlaTrainStep(
            replace(spec, loss=partial(_through, self._parts.root, spec.loss)),
            context.precision,
            max_graphs=options.max_graphs if options.compile_step else 0,
            collectives=context.collectives,
            world_size=context.world.size,
            parts=self._parts,
        )

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Entering it gathers all parameters, so all ranks enter it."""
        step = super().eval_step(spec)
        if self._parts is None:
            return step
        return _WholeEvalStep(spec, self.context.precision, self._parts)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        del spec
        self._refuse_manual()

    def state(self) -> ModelState:
        """The whole state on rank 0; the others help, and return an empty one."""
        if self._parts is None:
            return super().state()
        collectives, main = self.context.collectives, self.context.world.is_main

        def whole(shard: Shard) -> Tensor:
            rows = -(-shard.shape[0] // self.context.world.size)
            padded = torch.zeros((rows, *shard.shape[1:]), dtype=shard.data.dtype)
            padded[: shard.data.shape[0]] = shard.data
            found = collectives.all_gather(padded)
            return torch.cat([found[rank] for rank in self._order])[: shard.shape[0]]

        state = self.sharded_state()
        if self.context.world.size == 1:
            return _mapped(state, lambda _, value: _data(value))
        state = _mapped(state, lambda _, value: whole(value) if type(value) is Shard else value)
        return state if main else ModelState({}, [{} for _ in state.optimizers], state.precision)

    def sharded_state(self) -> ModelState:
        """What this rank holds, as copies on the host; nothing is sent."""
        module, parts = self._prepared(), self._parts
        if parts is None:
            return super().state()
        parts.scatter()
        torch_xla.sync()
        state = ModelState(
            gather_module(module),
            [gather_optimizer(each, module) for each in self._optimizers],
            self.context.precision.state_dict(),
        )
        return _mapped(state, parts.placed)

    def load_sharded(self, state: ModelState, *, strict: bool = True) -> None:
        """As ``load``, of stored tensors, of which each rank reads its parts."""
        self.load(state, strict=strict)

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any strategy and world, of which each rank keeps its parts.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        module, parts = self._prepared(), self._parts
        if parts is None:
            super().load(state, strict=strict)
            return
        parts.scatter()
        parts.check(state.module)
        mine = _mapped(state, parts.part)
        restore_module(module, mine.module, strict=strict)
        restore_optimizers(self._optimizers, module, mine.optimizers, strict=strict)
        self.context.precision.load_state_dict(state.precision)
        torch_xla.sync()

    def close(self) -> None:
        """Make the module whole in a world of one, and release the device.

        In another world it keeps this rank's parts, and the next ``prepare`` makes it whole.
        """
        if self._parts is not None and self.context.world.size == 1:
            self._make_whole(self._prepared())
        self._parts = None
        super().close()


class Parts:
    """A module whose parameters are this rank's parts, and what makes them whole.

    Args:
        module: On its device; changed in place.

    Attributes:
        rank: This process, as XLA's runtime counts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.root = XlaFullyShardedDataParallel(
            _Root(module), shard_param_on_dim_0=True, _use_xla_patched_linear=False
        )
        self.rank = int(self.root.rank)
        self._owners = [
            (owner, name, part)
            for (_, owner, name), part in zip(
                self.root.full_param_infos, self.root.sharded_params, strict=True
            )
        ]
        for _, _, owner, name, first, first_name in self.root.shared_full_param_infos:
            part = next(p for o, n, p in self._owners if o is first and n == first_name)
            self._owners.append((owner, name, part))
        for owner, name, part in self._owners:
            # The whole tensor, which forward uses, is an attribute of the same name.
            owner._parameters[name] = part  # noqa: SLF001 - as FSDP took it from there
        self._shapes = {
            name: tuple(part._orig_size)  # type: ignore[attr-defined]  # noqa: SLF001
            for name, part in module.named_parameters(remove_duplicate=False)
        }

    def gather(self) -> None:
        """Make it whole. Every rank calls it."""
        self.root._rebuild_full_params()  # noqa: SLF001 - there is no other way
        torch_xla.sync()

    def scatter(self) -> None:
        """Keep this rank's part."""
        self.root._free_full_params()  # noqa: SLF001

    def undo(self) -> None:
        """Give the module whole parameters again, new ones. Every rank calls it."""
        self.scatter()
        made: dict[int, nn.Parameter] = {}
        for owner, name, part in self._owners:
            del vars(owner)[name]
            if id(part) not in made:
                rows = part._orig_size[0]  # noqa: SLF001
                whole = xm.all_gather(part.detach())[:rows].clone()
                made[id(part)] = nn.Parameter(whole, part.requires_grad)
            owner._parameters[name] = made[id(part)]  # noqa: SLF001
        torch_xla.sync()

    def placed(self, name: str, value: Any) -> Any:
        """A tensor of this rank with its place in the whole."""
        if not isinstance(value, Tensor) or name not in self._shapes:
            return value
        shape, start, rows = self._box(name)
        if tuple(value.shape) != (self._padded(shape), *shape[1:]):
            return value
        return Shard(value[:rows], (start, *(0 for _ in shape[1:])), shape)

    def part(self, name: str, value: Any) -> Any:
        """This rank's part of a whole tensor, which may be a stored one."""
        if not isinstance(value, (Tensor, StoredTensor)) or name not in self._shapes:
            return value
        shape, start, rows = self._box(name)
        if tuple(value.shape) != shape:
            return value
        padded = self._padded(shape)
        if isinstance(value, Tensor):
            read = value[start : start + rows]
        elif rows:
            read = value.read((start, *(0 for _ in shape[1:])), (rows, *shape[1:]))
        else:
            return torch.zeros((padded, *shape[1:]))
        made = torch.zeros((padded, *shape[1:]), dtype=read.dtype)
        made[:rows] = read
        return made

    def check(self, module: Mapping[str, Any]) -> None:
        """Raises ``CheckpointError`` if whole tensors have other shapes than here."""
        differing = [
            f"{name} ({tuple(value.shape)} in the checkpoint, {self._shapes[name]} here)"
            for name, value in module.items()
            if name in self._shapes and tuple(value.shape) != self._shapes[name]
        ]
        if differing:
            raise CheckpointError(
                f"The checkpoint does not fit the module: shapes differ for {', '.join(differing)}"
                ".",
                "Build the module with the hyperparameters that it was saved with.",
            )

    def gradients(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """This rank's parts."""
        return gradients(optimizers)

    def pending(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """What a window has left so far, averaged over ranks already."""
        return gradients(optimizers)

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The 2-norm over the parts of all ranks, as a part of the graph."""
        squares = [grad.float().square().sum() for grad in grads]
        squared: Tensor = xm.all_reduce(xm.REDUCE_SUM, torch.stack(squares).sum())
        return squared.sqrt()

    def _box(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """The whole shape of a parameter, and which of its rows are here."""
        shape = self._shapes[name]
        chunk = self._padded(shape)
        start = min(self.rank * chunk, shape[0])
        return shape, start, min(chunk, shape[0] - start)

    def _padded(self, shape: tuple[int, ...]) -> int:
        """Rows of each rank's part, of which the last ranks may use fewer."""
        return -(-shape[0] // int(self.root.world_size))


class _Root(nn.Module):
    """What FSDP wraps: the loss is computed inside, whatever of the module it uses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return loss(self.module, batch)


class _WholeEvalStep(WholeEvalStep, XlaEvalStep):
    """Evaluation with a whole module on every rank, each batch as one graph."""

    __slots__ = ()


def _renew(module: nn.Module) -> None:
    """New parameters in the place of those that were trained before.

    FSDP computes wrong gradients of parameters that an optimizer has updated on the device before
    it took them (torch_xla 2.9).
    """
    made: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False, remove_duplicate=False):
            if old not in made:
                made[old] = nn.Parameter(old.detach().clone(), old.requires_grad)
            part._parameters[name] = made[old]  # noqa: SLF001 - so that its place is kept
    torch_xla.sync()


def _through(root: nn.Module, loss: Any, _module: nn.Module, batch: Any) -> Any:
    return root(loss, batch)


def _mapped(state: ModelState, change: Callable[[str, Any], Any]) -> ModelState:
    """A state with its tensors changed, each with the name of its parameter or buffer."""
    return ModelState(
        {name: change(name, value) for name, value in state.module.items()},
        [
            {
                **each,
                "state": {
                    name: {key: change(name, value) for key, value in kept.items()}
                    if isinstance(kept, Mapping)
                    else kept
                    for name, kept in each["state"].items()
                },
            }
            for each in state.optimizers
        ],
        state.precision,
    )


def _data(value: Any) -> Any:
    return value.data if type(value) is Shard else value


def _refuse_kinds(module: nn.Module) -> None:
    other = {
        name: f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    }
    other |= {name: "one number" for name, p in module.named_parameters() if not p.dim()}
    if other:
        name, what = next(iter(other.items()))
        raise UnsupportedError(
            f"The strategy 'fsdp1' was given a module with {len(other)} parameters or buffers that "
            f"XlaFullyShardedDataParallel does not take, the first of which is {name}: {what}.",
            "Make them float32 and of one dimension at least, or use 'zero1' or 'fsdp'.",
        )
