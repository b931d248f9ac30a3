"""A module whose layers are on several ranks, and microbatches that flow through them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.distributed as dist
from drivetrain_interfaces import (
    ConfigurationError,
    DataError,
    ModelState,
    UnsupportedError,
    UserCodeError,
)
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from drivetrain_toolkit.owners import gather_owned
from drivetrain_toolkit.rows import Gathered, GatheringStep, count_rows, some_rows
from drivetrain_toolkit.shards import Shards
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.state import gather_module, restore_module, restore_optimizers
from drivetrain_toolkit.steps import EagerTrainStep
from drivetrain_toolkit.strategies.eager import (
    EagerStrategy,
    WholeEvalStep,
    broadcast_module,
    with_options,
)
from drivetrain_toolkit.strategies.units import checkpoint_activations, keep_activations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        Precision,
        StepSpec,
        StrategyContext,
        TrainStep,
    )

_SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


@dataclass(frozen=True)
class PipelineOptions:
    """The options of ``PipelineStrategy``, as one value."""

    module: str | None
    balance: tuple[int, ...] | None
    split: tuple[str, ...] | None
    microbatches: int
    schedule: str
    activation_checkpointing: bool


class PipelineStrategy(EagerStrategy):
    """Each rank holds some consecutive layers of an ``nn.Sequential``; batches flow through all.

    What ranks draw together is the batch: it enters at the first rank, in parts, and the loss is
    computed at the last. All parameters must be in the sequence, and the loss function must call it
    once, with one tensor whose rows are the samples.

    Args:
        module: Name of the sequence in the user's module. None means the module itself, or its
            only child that is one.
        balance: Layers of each stage. None divides parameters as evenly as layers allow.
        split: Instead of ``balance``, names of the layers with which stages begin, but the first.
        microbatches: Parts of a batch. One that they do not divide has fewer.
        schedule: ``"gpipe"``, ``"1f1b"``, or ``"interleaved"``, in which each rank has several
            stages: those of ``balance`` or ``split`` in turn, two for each rank by default.
        activation_checkpointing: Layers make their activations again in backward.
    """

    name = "pipeline"
    capabilities: ClassVar = CAPABILITIES["pipeline"]

    _owners: dict[str, int] | None = None
    _sequence: nn.Sequential | None = None
    _bounds: tuple[tuple[int, int], ...] = ()
    _step: _PipelineStep | None = None

    def __init__(
        self,
        *,
        module: str | None = None,
        balance: Sequence[int] | None = None,
        split: Sequence[str] | None = None,
        microbatches: int = 4,
        schedule: str = "gpipe",
        activation_checkpointing: bool = False,
    ) -> None:
        self._options = PipelineOptions(
            module,
            None if balance is None else tuple(balance),
            None if split is None else tuple(split),
            microbatches,
            schedule,
            activation_checkpointing,
        )

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, take over rank 0's values, and keep this rank's layers.

        Parameters of the others lose their memory, and keep their names.

        Raises:
            ConfigurationError: There is no such sequence, it has too few layers, or ``balance`` or
                ``split`` do not fit it.
            UnsupportedError: A parameter is outside of it, or in several stages.
        """
        self._release()
        if self.context.world.size == 1:
            return super().prepare(module)
        module = super().prepare(module)
        broadcast_module(module, self.context.collectives)
        sequence = self._find(module)
        self._bounds = self._divide(sequence)
        prefix = next(name for name, part in module.named_modules() if part is sequence)
        size = self.context.world.size
        layer_owner = {
            layer: number % size
            for number, (first, last) in enumerate(self._bounds)
            for layer in [name for name, _ in list(sequence.named_children())[first:last]]
        }
        start = f"{prefix}." if prefix else ""
        self._owners = {
            f"{start}{layer}.{name}": owner
            for layer, owner in layer_owner.items()
            for name, _ in sequence.get_submodule(layer).named_parameters(remove_duplicate=False)
        }
        _refuse_outside(module, self._owners, self.name)
        _refuse_ties(module, self._owners, self.name)
        empty(module, self._owners, self.context.world.rank)
        module.__dict__["_drivetrain_stages"] = (size, self._owners, prefix)
        if self._options.activation_checkpointing:
            checkpoint_activations(list(sequence))
        self._sequence = sequence
        self._module = module
        return module

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step; it takes this rank's part of each batch.

        Raises:
            UnsupportedError: Before backward a hook is wanted, which is called on no loss here, or
                an optimizer needs a closure.
        """
        self._refuse_closures(spec)
        if spec.hooks.before_backward is not None:
            raise UnsupportedError(
                f"A hook before backward was asked of the strategy {self.name!r}, in which "
                "backward of one part runs while others go forward.",
                "Use another hook, or another strategy.",
            )
        if self.context.precision.policy.loss_scaling:
            raise UnsupportedError(
                f"Precision {self.context.precision.name!r} scales the loss, and the strategy "
                f"{self.name!r} computes it in parts on one rank.",
                "Use 'bf16-mixed' or '32-true'.",
            )
        if self._sequence is None:
            return super().train_step(spec)
        if self._step is not None:
            self._step.release()
        self._optimizers = tuple(spec.optimizers)
        self._step = _PipelineStep(spec, self.context.precision, self)
        return GatheringStep(self._step, Gathered(None, self.name))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Entering it gathers all layers, so all ranks enter it."""
        if self._sequence is None:
            return super().eval_step(spec)
        return WholeEvalStep(spec, self.context.precision, self)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def state(self) -> ModelState:
        """The whole state on rank 0; the others help, and return an empty one."""
        if self._owners is None:
            return super().state()
        module, owners = self._prepared(), self._owners
        world, collectives = self.context.world, self.context.collectives
        ids = {id(p): owners[name] for name, p in module.named_parameters(remove_duplicate=False)}
        optimizers = [
            gather_owned(each, module, lambda p: ids[id(p)], collectives, world.rank)
            for each in self._optimizers
        ]
        self.gather()
        whole = gather_module(module) if world.is_main else {}
        self.scatter()
        return ModelState(
            module=whole,
            optimizers=optimizers if world.is_main else [],
            precision=self.context.precision.state_dict(),
        )

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any strategy and world, of which each rank keeps its layers.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        if self._owners is None:
            super().load(state, strict=strict)
            return
        module, rank = self._prepared(), self.context.world.rank
        with torch.no_grad():
            self._restore_module(state, strict=strict)
        some = [
            {
                **saved,
                "state": {
                    name: value
                    for name, value in saved["state"].items()
                    if self._owners.get(name, rank) == rank
                },
            }
            for saved in state.optimizers
        ]
        restore_optimizers(self._optimizers, module, some, strict=strict)
        self.context.precision.load_state_dict(state.precision)

    def close(self) -> None:
        """Drop the step and release the device. The module keeps this rank's layers."""
        self._release()
        super().close()

    def gather(self) -> None:
        """Give every rank the memory and values of all layers. Every rank calls it."""
        assert self._owners is not None
        fill(self._prepared(), self._owners, self.context)

    def scatter(self) -> None:
        """Keep this rank's layers only."""
        assert self._owners is not None
        empty(self._prepared(), self._owners, self.context.world.rank)

    def _restore_module(self, state: ModelState, *, strict: bool) -> None:
        self.gather()
        try:
            restore_module(self._prepared(), state.module, strict=strict)
        finally:
            self.scatter()

    def _configure(self, options: Mapping[str, Any]) -> None:
        self._options = with_options(self.name, self._options, options)

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()
        options = self._options
        if options.schedule not in _SCHEDULES:
            raise ConfigurationError(
                f"schedule={options.schedule!r} was asked of the strategy {self.name!r}; there is "
                f"{listed(_SCHEDULES)}.",
                "Use one of them.",
            )
        if options.microbatches < 1:
            raise ConfigurationError(
                f"microbatches={options.microbatches} was asked of the strategy {self.name!r}.",
                "Give 1 or more.",
            )
        if options.balance is not None and options.split is not None:
            raise ConfigurationError(
                f"balance and split were both asked of the strategy {self.name!r}.",
                "Keep one of them.",
            )

    def _find(self, module: nn.Module) -> nn.Sequential:
        name = self._options.module
        if name is not None:
            found = dict(module.named_modules()).get(name)
        elif isinstance(module, nn.Sequential):
            found = module
        else:
            some = [part for part in module.children() if isinstance(part, nn.Sequential)]
            found = some[0] if len(some) == 1 else None
        if not isinstance(found, nn.Sequential):
            raise ConfigurationError(
                f"The strategy {self.name!r} divides an nn.Sequential, and "
                f"{type(module).__name__} has "
                + (f"none of the name {name!r}." if name is not None else "not exactly one."),
                "Put the layers into one, and give its name by module=.",
            )
        return found

    def _divide(self, sequence: nn.Sequential) -> tuple[tuple[int, int], ...]:
        options, size = self._options, self.context.world.size
        names = [name for name, _ in sequence.named_children()]
        if options.balance is not None:
            counts = options.balance
        elif options.split is not None:
            unknown = [name for name in options.split if name not in names[1:]]
            if unknown:
                raise ConfigurationError(
                    f"split names {listed(unknown)}, which no later layer of the sequence is "
                    f"called ({listed(names)}).",
                    "Give names of layers with which a stage begins.",
                )
            starts = [0, *sorted(names.index(name) for name in options.split), len(names)]
            counts = tuple(b - a for a, b in pairwise(starts))
        else:
            counts = balanced(
                [sum(p.numel() for p in layer.parameters()) for layer in sequence],
                size * (2 if options.schedule == "interleaved" else 1),
            )
        each = len(counts) // size
        fits = len(counts) % size == 0 and (
            each > 1 if options.schedule == "interleaved" else each == 1
        )
        if sum(counts) != len(names) or min(counts, default=0) < 1 or not fits:
            raise ConfigurationError(
                f"{len(names)} layers in stages of {list(counts)} were asked of the strategy "
                f"{self.name!r} with schedule={options.schedule!r} and {size} processes, which do "
                "not fit.",
                "Give every stage a layer, all layers a stage, and every process one stage, or "
                "several alike if interleaved.",
            )
        ends = [sum(counts[: number + 1]) for number in range(len(counts))]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def _release(self) -> None:
        if self._step is not None:
            self._step.release()
        if self._sequence is not None:
            self._sequence.forward = _refuse_use  # type: ignore[method-assign]
        self._step = self._sequence = self._owners = None


def balanced(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """How many consecutive items each part gets, so that the largest part is small.

    Every part gets at least one item, while there are any.
    """
    counts, first = [], 0
    for part in range(parts):
        left = parts - part
        target = sum(sizes[first:]) / left
        last, held = first, 0.0
        while last < len(sizes) - (left - 1):
            if last > first and left > 1 and held + sizes[last] / 2 > target:
                break
            held += sizes[last]
            last += 1
        counts.append(last - first)
        first = last
    return tuple(counts)


def fill(module: nn.Module, owners: Mapping[str, int], context: StrategyContext) -> None:
    """Give memory to the layers of other ranks, and their owner's values to all."""
    rank, collectives = context.world.rank, context.collectives
    with torch.no_grad():
        for name, owner in _layers(owners).items():
            part = module.get_submodule(name)
            if owner != rank:
                _with_memory(part, full=True)
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                tensor.data.copy_(collectives.broadcast(tensor.detach(), owner))


def empty(module: nn.Module, owners: Mapping[str, int], rank: int) -> None:
    """Take the memory of other ranks' layers away."""
    for name, owner in _layers(owners).items():
        if owner != rank:
            _with_memory(module.get_submodule(name), full=False)


def make_whole(module: nn.Module, context: StrategyContext) -> bool:
    """Undo what ``prepare`` of an earlier run did; False if that had another number of ranks."""
    size, owners, name = module.__dict__["_drivetrain_stages"]
    if size != context.world.size:
        return False
    del module.__dict__["_drivetrain_stages"]
    sequence = module.get_submodule(name)
    vars(sequence).pop("forward", None)
    keep_activations(sequence)
    fill(module, owners, context)
    return True


def _layers(owners: Mapping[str, int]) -> dict[str, int]:
    return {name.rpartition(".")[0]: owner for name, owner in owners.items()}


def _with_memory(part: nn.Module, *, full: bool) -> None:
    """New memory for a module's own tensors; optimizers go on holding the same parameters.

    Without, a tensor is one number in its shape.
    """
    for parameter in part.parameters(recurse=False):
        parameter.data = _blank(parameter, full=full)
    for name, buffer in list(part.named_buffers(recurse=False)):
        setattr(part, name, _blank(buffer, full=full))


def _blank(tensor: Tensor, *, full: bool) -> Tensor:
    if full:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.new_zeros(()).expand(tensor.shape)


def _refuse_use(*_: Any) -> Any:
    raise UserCodeError(
        "A module of which this rank holds some layers only was called after its run.",
        "Give it to a trainer again, or load the run's checkpoint into a new one.",
    )


def _refuse_outside(module: nn.Module, owners: Mapping[str, int], name: str) -> None:
    outside = [n for n, _ in module.named_parameters(remove_duplicate=False) if n not in owners]
    if outside:
        raise UnsupportedError(
            f"The strategy {name!r} divides a sequence of layers, and {listed(outside)} "
            f"{'is' if len(outside) == 1 else 'are'} not in it.",
            "Make them layers of the sequence.",
        )


def _refuse_ties(module: nn.Module, owners: Mapping[str, int], name: str) -> None:
    groups: dict[int, list[str]] = {}
    for parameter, value in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(parameter)
    for names in groups.values():
        if len({owners[each] for each in names}) > 1:
            raise UnsupportedError(
                f"The strategy {name!r} was asked to put {listed(names)} on several ranks, which "
                "are one parameter with several names.",
                "Choose stages so that all of them are in one, or untie them.",
            )


class _Entered(BaseException):  # no error: it ends the loss function where the sequence begins
    """Carries what the sequence was called with."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _PipelineStep(EagerTrainStep):
    """A train step whose forward and backward are one, on a schedule."""

    __slots__ = ("_device", "_losses", "_owner", "_parts", "_plan", "_share", "_spec", "_whole")

    def __init__(self, spec: StepSpec, precision: Precision, owner: PipelineStrategy) -> None:
        super().__init__(
            spec, precision, parts=Shards(everywhere=[cast("dist.ProcessGroup", dist.group.WORLD)])
        )
        self._spec = spec
        self._owner: PipelineStrategy | None = owner
        self._device = owner.device
        self._plan: tuple[int, Any] | None = None
        self._whole: Any = None
        self._share: Tensor | float = 1.0
        self._losses: list[Tensor] = []
        self._parts = 1

    def release(self) -> None:
        """Let go of the stages. The step cannot be called any more."""
        super().release()
        self._owner = self._plan = None

    def _differentiate(self, microbatch: Any, share: Tensor | float | None) -> Tensor:
        if self._owner is None:
            return self._forward(microbatch)  # says that it was released
        rows = count_rows(microbatch, self._owner.name)
        schedule = self._schedule(rows)
        world = self._owner.context.world
        self._whole, self._share, self._losses = microbatch, 1.0 if share is None else share, []
        last = dist.get_world_size() - 1
        with self._autocast():
            arguments = (self._input(microbatch),) if world.rank == 0 else ()
            target = {"target": torch.arange(rows)} if world.rank == last else {}
            schedule.step(*arguments, **target)
        if self._after_backward is not None:
            self._after_backward()
        loss = (
            torch.stack(self._losses).sum()
            if self._losses
            else torch.zeros((), device=self._device)
        )
        dist.broadcast(loss, last)
        return loss

    def _schedule(self, rows: int) -> Any:
        if self._plan is not None and self._plan[0] == rows:
            return self._plan[1]
        owner = self._owner
        assert owner is not None
        sequence, options = owner._sequence, owner._options  # noqa: SLF001 - two halves of one
        assert sequence is not None
        size, rank = owner.context.world.size, owner.context.world.rank
        parts = next(n for n in range(min(options.microbatches, rows), 0, -1) if rows % n == 0)
        bounds = owner._bounds  # noqa: SLF001
        stages = [
            PipelineStage(sequence[first:last], number, len(bounds), self._device)
            for number, (first, last) in enumerate(bounds)
            if number % size == rank
        ]
        kind = _SCHEDULES[options.schedule]
        held: Any = stages if options.schedule == "interleaved" else stages[0]
        try:
            made = kind(held, parts, loss_fn=self._part_loss, scale_grads=False)
        except ValueError as error:
            raise DataError(
                f"A batch of {rows} rows was given to the strategy {owner.name!r} on {size} "
                f"processes, which makes {parts} microbatches of it; "
                f"{options.schedule!r} wants more.",
                "Use larger batches, other microbatches, or schedule='gpipe'.",
            ) from error
        self._parts = parts
        self._plan = (rows, made)
        return made

    def _input(self, microbatch: Any) -> Tensor:
        """What the user's loss function gives to the sequence."""
        try:
            with torch.no_grad():
                self._through(microbatch, _enter)
        except _Entered as entered:
            if isinstance(entered.value, Tensor):
                return entered.value
            raise UserCodeError(
                f"The loss function called the sequence with a {type(entered.value).__name__}.",
                "Call it with one tensor whose rows are the samples.",
            ) from None
        raise UserCodeError(
            "The loss function did not call the sequence that the strategy 'pipeline' divides.",
            "Call it once, with one tensor whose rows are the samples.",
        )

    def _part_loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """The loss of one part, for its share of the whole."""
        first, count = int(rows[0]), rows.shape[0]
        part = some_rows(self._whole, first, first + count)
        loss = self._through(part, lambda _: output) / self._parts
        self._losses.append(loss.detach())
        return loss * self._share

    def _through(self, microbatch: Any, instead: Any) -> Tensor:
        """The user's loss, with something in the place of the sequence."""
        assert self._owner is not None
        sequence = self._owner._sequence  # noqa: SLF001
        assert sequence is not None
        sequence.forward = instead  # type: ignore[method-assign]
        try:
            return self._spec.loss(self._spec.module, microbatch)
        finally:
            del sequence.forward


def _enter(value: Any, *_: Any) -> Any:
    raise _Entered(value)
