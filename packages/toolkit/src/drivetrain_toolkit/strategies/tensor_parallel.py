"""Layers whose parameters and work are divided over ranks, by a plan (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from drivetrain_interfaces import ConfigurationError, ModelState, UnsupportedError
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from drivetrain_toolkit.rows import Gathered, GatheringStep
from drivetrain_toolkit.shards import (
    Shards,
    gather_parts,
    part_of,
    restore_parts,
    sharded_parts,
    shared_update,
    whole_of,
)
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.steps import EagerTrainStep, make_train_step
from drivetrain_toolkit.strategies.eager import (
    EagerStrategy,
    WholeEvalStep,
    broadcast_module,
    with_options,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        StepSpec,
        TrainStep,
    )
    from torch.optim import Optimizer

    from drivetrain_toolkit.steps import Update

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel, "sequence": SequenceParallel}


@dataclass(frozen=True)
class TensorParallelOptions:
    """The options of ``TensorParallelStrategy``, as one value."""

    plan: Mapping[str, ParallelStyle | str] | None


class TensorParallelStrategy(EagerStrategy):
    """Each rank holds parts of some layers and does their share of the work.

    What ranks draw together is the batch, and every rank has all of it. Layers outside of the plan
    are whole on every rank, and must be given whole tensors there.

    Args:
        plan: What is divided, and how: names of modules, in which ``*`` stands for anything between
            two dots, and styles of ``torch.distributed.tensor.parallel``. ``"colwise"``,
            ``"rowwise"`` and ``"sequence"`` stand for torch's styles with their defaults.
    """

    name = "tp"
    capabilities: ClassVar = CAPABILITIES["tp"]

    _installed: _Installed | None = None
    _step: EagerTrainStep | None = None

    def __init__(self, *, plan: Mapping[str, ParallelStyle | str] | None = None) -> None:
        self._options = TensorParallelOptions(plan)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, take over rank 0's values, and divide what the plan names, in place.

        Raises:
            ConfigurationError: The plan names no module, or a style that there is not.
            UnsupportedError: A style cannot divide the module, or the module shares a parameter.
        """
        self._release()
        module = super().prepare(module)
        styles = self._styles(module)
        if self.context.world.size == 1:
            return module
        _refuse_ties(module, styles, self.name)
        broadcast_module(module, self.context.collectives)
        mesh = init_device_mesh(
            self.device.type, (self.context.world.size,), mesh_dim_names=("tp",)
        )
        trained = {name: p.requires_grad for name, p in module.named_parameters()}
        installed = _Installed(module)
        for name, style in styles.items():
            part = module.get_submodule(name)
            _refuse_unequal(name, part, style, mesh.size(), self.name)
            try:
                parallelize_module(part, mesh, style)
            except NotImplementedError as error:
                raise UnsupportedError(
                    f"The plan of the strategy {self.name!r} divides {name!r}, a "
                    f"{type(part).__name__}, by {type(style).__name__}, which torch cannot do.",
                    "Name the linear layers and embeddings in it, or use another style.",
                ) from error
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[name])
        installed.find()
        self._installed = installed
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step; it takes this rank's part of each batch.

        Raises:
            ConfigurationError: An optimizer was built before ``prepare``.
            UnsupportedError: An optimizer needs a closure, or takes whole and divided parameters
                at once.
        """
        self._refuse_closures(spec)
        if self._installed is None:
            return super().train_step(spec)
        self._refuse_foreign(spec)
        if self._step is not None:
            self._step.release()
        self._optimizers = tuple(spec.optimizers)
        self._step = make_train_step(
            spec,
            self.context.precision,
            forward=_SameDraws(partial(spec.loss, spec.module), self.device),
            update=_Settled(shared_update(self.context.precision, None), spec, self.name),
            parts=Shards(),
        )
        return GatheringStep(self._step, Gathered(None, self.name))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Entering it makes the module whole, so all ranks enter it.

        Between that and leaving it no rank waits for another, however many batches each has.
        """
        if self._installed is None:
            return super().eval_step(spec)
        return WholeEvalStep(spec, self.context.precision, self._installed)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def state(self) -> ModelState:
        """The whole state on rank 0; the others help, and return an empty one."""
        if self._installed is None:
            return super().state()
        module = self._prepared()
        return gather_parts(
            module,
            self._optimizers,
            self.context.precision,
            keep=self.context.world.is_main,
        )

    def sharded_state(self) -> ModelState:
        """What this rank holds, as copies on the host; no rank waits for another."""
        if self._installed is None:
            return super().state()
        return sharded_parts(self._prepared(), self._optimizers, self.context.precision)

    def load_sharded(self, state: ModelState, *, strict: bool = True) -> None:
        """As ``load``, of stored tensors, of which each rank reads its parts."""
        self.load(state, strict=strict)

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any strategy and world, of which each rank keeps its parts.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        if self._installed is None:
            super().load(state, strict=strict)
            return
        module = self._prepared()
        restore_parts(module, self._optimizers, self.context.precision, state, strict=strict)

    def close(self) -> None:
        """Take the hooks away and release the device. The module keeps this rank's parts.

        The next ``prepare`` makes it whole; until then, using what is divided raises an error.
        """
        self._release()
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        self._options = with_options(self.name, self._options, options)

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()
        if not self._options.plan:
            raise ConfigurationError(
                f"The strategy {self.name!r} was asked for without a plan.",
                "Say what is divided, as in TensorParallelStrategy(plan={'up': 'colwise', "
                "'down': 'rowwise'}).",
            )
        self._refuse_other_collectives()

    def _styles(self, module: nn.Module) -> dict[str, ParallelStyle]:
        """The style of each module that the plan names, outer ones first."""
        assert self._options.plan
        found: dict[str, ParallelStyle] = {}
        names = [name for name, _ in module.named_modules()]
        for pattern, asked in self._options.plan.items():
            style = _STYLES[asked]() if isinstance(asked, str) and asked in _STYLES else asked
            if not isinstance(style, ParallelStyle):
                raise ConfigurationError(
                    f"The plan of the strategy {self.name!r} says {asked!r} for {pattern!r}; there "
                    f"is {listed(_STYLES)}, and torch's objects.",
                    "Use one of them.",
                )
            some = [name for name in names if _matches(name, pattern)]
            if not some:
                raise ConfigurationError(
                    f"The plan of the strategy {self.name!r} names {pattern!r}, and "
                    f"{type(module).__name__} has no such module.",
                    "Use names of module.named_modules(), with * between dots.",
                )
            found |= dict.fromkeys(some, style)
        return {name: found[name] for name in names if name in found}

    def _release(self) -> None:
        if self._step is not None:
            self._step.release()
        if self._installed is not None:
            self._installed.remove()
        self._step = self._installed = None


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _refuse_ties(module: nn.Module, planned: Mapping[str, Any], owner: str) -> None:
    """Torch divides a parameter by the module that has it, and the other would keep the old one."""
    groups: dict[int, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    for names in groups.values():
        if len(names) > 1 and any(name.rpartition(".")[0] in planned for name in names):
            raise UnsupportedError(
                f"The strategy {owner!r} was asked to divide {listed(names)}, which are one "
                "parameter with several names.",
                "Untie them, or leave the modules out of the plan.",
            )


def _refuse_unequal(
    name: str, part: nn.Module, style: ParallelStyle, ranks: int, owner: str
) -> None:
    """Plain tensors do not say how long other ranks' parts are, so torch takes them as equal."""
    if not isinstance(style, ColwiseParallel) or not style.use_local_output:
        return
    width = getattr(part, "out_features", getattr(part, "embedding_dim", 0))
    if width % ranks and style.output_layouts[0].is_shard():
        raise UnsupportedError(
            f"The plan of the strategy {owner!r} divides the {width} outputs of {name!r} over "
            f"{ranks} ranks, which makes unequal parts.",
            "Choose a width that the ranks divide, or ColwiseParallel(use_local_output=False).",
        )


class _Installed:
    """What torch added to a module: hooks, and tensors of which each rank has a part."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tables = [
            table
            for part in module.modules()
            for table in (
                part._forward_pre_hooks,  # noqa: SLF001 - torch has no way to list them
                part._forward_pre_hooks_with_kwargs,  # noqa: SLF001
                part._forward_hooks,  # noqa: SLF001
                part._forward_hooks_with_kwargs,  # noqa: SLF001
            )
        ]
        self._before: list[dict[int, Any]] = [dict(table) for table in self._tables]
        self._after: list[dict[int, Any]] = []
        self._parts: list[tuple[dict[str, Any], str, DTensor]] = []

    def find(self) -> None:
        """Note what was added since this object was made."""
        self._after = [dict(table) for table in self._tables]

    def gather(self) -> None:
        """The module as it was, with whole tensors. Every rank calls it."""
        self._set(self._before, self._after)
        with torch.no_grad():
            for table, name, tensor in self._divided():
                whole = whole_of(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
                self._parts.append((table, name, tensor))

    def scatter(self) -> None:
        """Undo ``gather``; what was written to whole tensors is lost."""
        while self._parts:
            table, name, tensor = self._parts.pop()
            table[name] = tensor
        self._set(self._after, self._before)

    def remove(self) -> None:
        """Take hooks away for good. Parameters stay the parts that they are, buffers are whole."""
        self._set(self._before, self._after)
        for part in self._module.modules():
            vars(part).pop("_distribute_module_applied", None)  # torch would refuse a second time
        for table, name, tensor in self._divided():
            if not isinstance(tensor, nn.Parameter):
                table[name] = part_of(tensor)

    def _set(self, wanted: Sequence[dict[int, Any]], now: Sequence[dict[int, Any]]) -> None:
        for table, new, old in zip(self._tables, wanted, now, strict=True):
            held: dict[int, Any] = table
            for key in old.keys() - new.keys():
                held.pop(key, None)
            held.update({key: new[key] for key in new if key not in old})

    def _divided(self) -> list[tuple[dict[str, Any], str, DTensor]]:
        found: list[tuple[dict[str, Any], str, DTensor]] = []
        for part in self._module.modules():
            for table in (part._parameters, part._buffers):  # noqa: SLF001 - one loop for both
                held: dict[str, Any] = table
                found += [(held, n, t) for n, t in held.items() if isinstance(t, DTensor)]
        return found


class _SameDraws:
    """A loss function in which ranks draw the same random numbers, and that returns a plain tensor.

    Ranks have random states of their own, and layers that are whole must do the same on all. So
    rank 0 draws a seed for each microbatch; its state, and so the seeds, are in checkpoints.
    """

    def __init__(self, loss: Callable[[Any], Tensor], device: torch.device) -> None:
        self._loss = loss
        self._device = device
        self._devices = [] if device.type == "cpu" else [device]

    def __call__(self, microbatch: Any) -> Tensor:
        seed = torch.zeros((), dtype=torch.int64)
        if dist.get_rank() == 0:
            seed = torch.randint(2**62, ())
        seed = seed.to(self._device)
        dist.broadcast(seed, 0)
        kind = self._device.type if self._devices else "cuda"  # unused without devices
        with torch.random.fork_rng(self._devices, device_type=kind):
            torch.manual_seed(int(seed))
            return whole_of(self._loss(microbatch))


class _Settled:
    """An update for which gradients are divided as their parameters are.

    Args:
        update: The update.
        spec: What is trained.
        owner: Name of the strategy, for messages.
    """

    def __init__(self, update: Update, spec: StepSpec, owner: str) -> None:
        self._update = update
        self._mixed: list[tuple[Optimizer, int]] = []
        for optimizer in spec.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                if len({isinstance(p, DTensor) for p in group["params"]}) > 1:
                    _refuse_together(optimizer, group, owner)
                    if "foreach" in group:
                        self._mixed.append((optimizer, number))

    def __call__(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    grad = parameter.grad
                    if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                        parameter.grad = grad.redistribute(placements=parameter.placements)
        # Torch updates many parameters in one call by default, but not whole and divided ones.
        mixed = [optimizer.param_groups[number] for optimizer, number in self._mixed]
        before = [group["foreach"] for group in mixed]
        for group in mixed:
            group["foreach"] = False
        try:
            return self._update(optimizers, prepare)
        finally:
            for group, value in zip(mixed, before, strict=True):
                group["foreach"] = value


def _refuse_together(optimizer: Optimizer, group: Mapping[str, Any], owner: str) -> None:
    for option in ("foreach", "fused"):
        if group.get(option):
            raise UnsupportedError(
                f"{type(optimizer).__name__} was asked for {option}=True over parameters of which "
                f"the strategy {owner!r} divides some, which torch does not update together.",
                "Leave it out, or give what is divided an optimizer of its own.",
            )
