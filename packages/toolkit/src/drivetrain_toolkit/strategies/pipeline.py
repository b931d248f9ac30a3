"""A module whose layers are on several ranks, and microbatches that flow through them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain_interfaces import (
    ConfigurationError,
    ModelState,
    UnsupportedError,
    UserCodeError,
)
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
)

from drivetrain_toolkit.owners import gather_owned
from drivetrain_toolkit.rows import Gathered, GatheringStep
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.state import gather_module
from drivetrain_toolkit.strategies.divided import DividedStrategy
from drivetrain_toolkit.strategies.eager import (
    WholeEvalStep,
    broadcast_module,
    with_options,
)
from drivetrain_toolkit.strategies.pipeline_step import SCHEDULES, PipelineStep
from drivetrain_toolkit.strategies.stages import (
    Layers,
    Line,
    balanced,
    elsewhere,
    empty,
    fill,
    refuse_outside,
    refuse_ties,
)
from drivetrain_toolkit.strategies.tracing import owners_of, trace
from drivetrain_toolkit.strategies.units import checkpoint_activations

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


@dataclass(frozen=True)
class PipelineOptions:
    """The options of ``PipelineStrategy``, as one value."""

    module: str | None
    balance: tuple[int, ...] | None
    split: tuple[str, ...] | None
    microbatches: int
    schedule: str
    activation_checkpointing: bool
    copies: int
    example: Tensor | None


class PipelineStrategy(DividedStrategy):
    """Each rank holds some consecutive layers of a module; batches flow through all.

    The module is an ``nn.Sequential``, or any other that torch can trace, if there is an example.
    What ranks draw together is the batch: it enters at the first rank, in parts, and the loss is
    computed at the last. All parameters must be in that module, and the loss function must call it
    once, with one tensor whose rows are the samples.

    Args:
        module: Name of what is divided in the user's module. None means the module itself, or its
            only child that is a sequence; with an example, its only child or else the module.
        balance: Layers of each stage. None divides parameters as evenly as layers allow.
        split: Instead of ``balance``, names of the layers with which stages begin, but the first.
        microbatches: Parts of a batch. One that they do not divide has fewer.
        schedule: ``"gpipe"``, ``"1f1b"``, or ``"interleaved"``, in which each rank has several
            stages: those of ``balance`` or ``split`` in turn, two for each rank by default.
        activation_checkpointing: Layers make their activations again in backward.
        copies: Pipelines beside each other, each with neighbouring ranks and a batch of its own,
            that average gradients.
        example: What a module that is no sequence is called with, such as a tensor of one row. It
            is traced with that, and with the shapes of batches; ``split`` names the modules with
            which stages begin.
    """

    name = "pipeline"
    capabilities: ClassVar = CAPABILITIES["pipeline"]

    _owners: dict[str, int] | None = None
    _sequence: nn.Module | None = None
    _bounds: tuple[tuple[int, int], ...] = ()
    _step: PipelineStep | None = None
    _line: Line | None = None

    def __init__(
        self,
        *,
        module: str | None = None,
        balance: Sequence[int] | None = None,
        split: Sequence[str] | None = None,
        microbatches: int = 4,
        schedule: str = "gpipe",
        activation_checkpointing: bool = False,
        copies: int = 1,
        example: Tensor | None = None,
    ) -> None:
        self._options = PipelineOptions(
            module,
            None if balance is None else tuple(balance),
            None if split is None else tuple(split),
            microbatches,
            schedule,
            activation_checkpointing,
            copies,
            example,
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
        prefix = next(name for name, part in module.named_modules() if part is sequence)
        size = self._stages()
        self._line = Line(self.context.world.size // size, self.device)
        start = f"{prefix}." if prefix else ""
        owners = self._owners_in(sequence)
        self._owners = {f"{start}{name}": owner for name, owner in owners.items()}
        refuse_outside(module, self._owners, self.name)
        refuse_ties(module, self._owners, self.name)
        empty(module, self._owners, self._line.stage)
        module.__dict__["_drivetrain_stages"] = (
            self.context.world.size,
            size,
            self._owners,
            prefix,
        )
        if self._options.activation_checkpointing:
            checkpoint_activations(list(sequence.children()))
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
                f"The hook before_backward was asked of the strategy {self.name!r}, in which "
                "backward of one part runs while others go forward.",
                "Use another hook, or another strategy.",
            )
        if self._sequence is None:
            return super().train_step(spec)
        if self._step is not None:
            self._step.release()
        self._optimizers = tuple(spec.optimizers)
        self._step = PipelineStep(spec, self.context.precision, self)
        assert self._line is not None
        return GatheringStep(self._step, Gathered(self._line.group, self.name))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Entering it gathers all layers, so all ranks enter it."""
        if self._sequence is None:
            return super().eval_step(spec)
        return WholeEvalStep(spec, self.context.precision, self)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def close(self) -> None:
        """Drop the step and release the device. The module keeps this rank's layers."""
        self._release()
        super().close()

    def gather(self) -> None:
        """Give every rank the memory and values of all layers. Every rank calls it."""
        assert self._owners is not None
        assert self._line is not None
        fill(self._prepared(), self._owners, self.context, self._line.stage)

    def scatter(self) -> None:
        """Keep this rank's layers only."""
        assert self._owners is not None
        assert self._line is not None
        empty(self._prepared(), self._owners, self._line.stage)

    def _is_divided(self) -> bool:
        return self._owners is not None

    def _absent(self) -> frozenset[str]:
        assert self._owners is not None
        assert self._line is not None
        return elsewhere(self._prepared(), self._owners, self._line.stage)

    def _gathered(self, module: nn.Module) -> ModelState:
        assert self._owners is not None
        owners, context = self._owners, self.context
        ids = {id(p): owners[name] for name, p in module.named_parameters(remove_duplicate=False)}
        optimizers = [
            gather_owned(
                each, module, lambda p: ids[id(p)], context.collectives, context.world.rank
            )
            for each in self._optimizers
        ]
        self.gather()
        whole = gather_module(module) if context.world.is_main else {}
        self.scatter()
        return ModelState(
            module=whole,
            optimizers=optimizers if context.world.is_main else [],
            precision=context.precision.state_dict(),
        )

    def _configure(self, options: Mapping[str, Any]) -> None:
        self._options = with_options(self.name, self._options, options)

    def _check(self) -> None:
        super()._check()
        if self.context.precision.policy.loss_scaling:
            raise UnsupportedError(
                f"Precision {self.context.precision.name!r} scales the loss, and the strategy "
                f"{self.name!r} computes it in parts on one rank.",
                "Use 'bf16-mixed' or '32-true'.",
            )
        self._refuse_sync_batchnorm()
        self._refuse_other_devices()
        options = self._options
        if options.schedule not in SCHEDULES:
            raise ConfigurationError(
                f"schedule={options.schedule!r} was asked of the strategy {self.name!r}; there is "
                f"{listed(SCHEDULES)}.",
                "Use one of them.",
            )
        if options.microbatches < 1:
            raise ConfigurationError(
                f"microbatches={options.microbatches} was asked of the strategy {self.name!r}.",
                "Give 1 or more.",
            )
        size = self.context.world.size
        if options.copies < 1 or size % options.copies or (size > 1 and size == options.copies):
            raise ConfigurationError(
                f"copies={options.copies} was asked of the strategy {self.name!r} in a world of "
                f"{size}.",
                f"Use a divisor of {size} that leaves two ranks or more for each copy.",
            )
        some = (options.split, options.example)
        if options.balance is not None and any(each is not None for each in some):
            raise ConfigurationError(
                f"balance was asked of the strategy {self.name!r} besides split or an example.",
                "Keep one of them.",
            )
        if options.example is not None and options.activation_checkpointing:
            raise ConfigurationError(
                f"activation_checkpointing and an example were asked of the strategy "
                f"{self.name!r}, which traces modules as they are.",
                "Call torch.utils.checkpoint in the module, or leave one of them out.",
            )

    @property
    def options(self) -> PipelineOptions:
        """The options, as one value."""
        return self._options

    @property
    def divided(self) -> nn.Module:
        """What is divided."""
        assert self._sequence is not None
        return self._sequence

    def line(self) -> tuple[Line, frozenset[int]]:
        """This rank's pipeline, and the parameters of this rank's layers, by ``id``."""
        assert self._owners is not None
        assert self._line is not None
        named, stage = dict(self._prepared().named_parameters()), self._line.stage
        held = frozenset(id(p) for name, p in named.items() if self._owners[name] == stage)
        return self._line, held

    def _stages(self) -> int:
        """How many ranks share one copy of the module."""
        return self.context.world.size // self._options.copies

    def _find(self, module: nn.Module) -> nn.Module:
        name, traced = self._options.module, self._options.example is not None
        kind = nn.Module if traced else nn.Sequential
        found: nn.Module | None = module
        if name is not None:
            found = dict(module.named_modules()).get(name)
        elif not isinstance(module, nn.Sequential):
            some = [part for part in module.children() if isinstance(part, kind)]
            found = some[0] if len(some) == 1 else module if traced else None
        if not isinstance(found, kind):
            raise ConfigurationError(
                f"The strategy {self.name!r} divides an nn.Sequential, and "
                f"{type(module).__name__} has "
                + (f"none of the name {name!r}." if name is not None else "not exactly one."),
                "Put the layers into one, and give its name by module=; or give an example, with "
                "which any other module is traced.",
            )
        return found

    def _owners_in(self, net: nn.Module) -> dict[str, int]:
        """Which stage has each parameter of what is divided, by its names there."""
        size = self._stages()
        if self._options.example is None:
            assert isinstance(net, nn.Sequential)
            self._bounds = self._divide(net)
            return {
                f"{layer}.{name}": number % size
                for number, (first, last) in enumerate(self._bounds)
                for layer in [name for name, _ in list(net.named_children())[first:last]]
                for name, _ in net.get_submodule(layer).named_parameters(remove_duplicate=False)
            }
        split = self._options.split or ()
        each, rest = divmod(len(split) + 1, size)
        if rest or (each > 1) != (self._options.schedule == "interleaved"):
            raise ConfigurationError(
                f"split={list(split)} was asked of the strategy {self.name!r} with an example, "
                f"schedule={self._options.schedule!r} and {size} processes, which do not fit.",
                "Name the modules with which stages begin: as many as there are processes, less "
                "one; or for several stages each, if interleaved.",
            )
        example = self._options.example.to(self.device)
        return owners_of(net, trace(net, example, split, self.name), size, self.name)

    def made_stages(self, example: Callable[[], Tensor]) -> list[Any]:
        """This rank's stages; ``example`` makes what a part of a batch is for the first one."""
        net, line, options = self._sequence, self._line, self._options
        assert net is not None
        assert line is not None
        if options.example is not None:
            pipe = trace(net, example(), options.split or (), self.name)
            return [
                pipe.build_stage(number, self.device, line.group)
                for number in range(line.stage, pipe.num_stages, line.stages)
            ]
        assert isinstance(net, nn.Sequential)
        bounds = self._bounds
        return [
            PipelineStage(
                Layers(net[first:last], first=number == 0),
                number,
                len(bounds),
                self.device,
                group=line.group,
            )
            for number, (first, last) in enumerate(bounds)
            if number % line.stages == line.stage
        ]

    def _divide(self, sequence: nn.Sequential) -> tuple[tuple[int, int], ...]:
        options, size = self._options, self._stages()
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
            self._sequence.forward = _refuse_use
        self._step = self._sequence = self._owners = self._line = None


def _refuse_use(*_: Any) -> Any:
    raise UserCodeError(
        "A module of which this rank holds some layers only was called after its run.",
        "Give it to a trainer again, or load the run's checkpoint into a new one.",
    )
