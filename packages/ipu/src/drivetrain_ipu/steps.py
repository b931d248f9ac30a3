"""Steps as programs: one call, or one evaluation, is one call of an executor of PopTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import DataError, ReduceOp, StepResult, UserCodeError

from drivetrain_ipu.batches import Tree, check_rows, joined, shapes
from drivetrain_ipu.options import inference_options, training_options
from drivetrain_ipu.sdk import acquiring
from drivetrain_ipu.traced import EvalModule, TrainModule, modes

if TYPE_CHECKING:
    from collections.abc import Collection

    from drivetrain_interfaces import EvalSpec, Precision, StepSpec
    from torch import Tensor
    from typing_extensions import Self

    from drivetrain_ipu.optimizers import DeviceOptimizer
    from drivetrain_ipu.strategy import IpuStrategy

#: Programs of one evaluation: more than a few different batches are a mistake of the loader.
MOST_PROGRAMS = 4


class IpuTrainStep:
    """Forward, backward and update as one program.

    It is compiled in the first call, for the batch that it gets. ``with step:`` holds the device;
    leaving it brings weights and optimizer state back to the host.

    Args:
        spec: What to train, and how.
        precision: The numeric format.
        owner: The strategy, which knows what else wants the device.
        optimizer: The one there is, on both sides.
    """

    #: While the first call traces it, and never again; the trainer asks for it.
    runs_user_code_once = True

    def __init__(
        self, spec: StepSpec, precision: Precision, owner: IpuStrategy, optimizer: DeviceOptimizer
    ) -> None:
        self._spec = spec
        self._precision = precision
        self._owner = owner
        self.optimizer = optimizer
        self._entered = False
        self._closed = False
        self.executor: Any = None
        self._module: TrainModule | None = None
        self._tree: Tree | None = None
        self._shapes: Any = None
        self._modes: tuple[bool, ...] = ()
        self._modules = list(spec.module.modules())
        ranks = owner.context.world.size
        self._weigh_ranks = spec.weight is not None and spec.weight_over_ranks and ranks > 1
        self._weighted = spec.accumulate > 1 or self._weigh_ranks

    # The device
    def __enter__(self) -> Self:
        self._entered = True
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered = False
        self.detach()

    @property
    def entered(self) -> bool:
        """Whether the step is between its beginning and its end."""
        return self._entered

    def attach(self) -> None:
        """Load the program onto the device, if it is compiled and not there."""
        if self.executor is not None and not self.executor.isAttachedToDevice():
            with acquiring():
                self.executor.attachToDevice()

    def detach(self) -> None:
        """Bring everything back to the host, and leave the device to others."""
        if self.executor is not None and self.executor.isAttachedToDevice():
            self.executor.detachFromDevice()

    def release(self) -> None:
        """Give the module back as it was. The step cannot be called any more."""
        self._closed = True
        if self.executor is None:
            return
        if self.executor.isCompiled():
            self.executor.destroy()
        elif self._module is not None:
            _unwrap(self._module)
        self.executor = None

    # Training
    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window of one to ``accumulate`` microbatches.

        Raises:
            DataError: The window is empty, too long, or of another shape than the first one.
            UserCodeError: The loss is no scalar tensor, or the step was closed.
            UnavailableError: The device is busy.
        """
        if self._closed:
            raise UserCodeError(
                "A train step was called after its strategy was closed or had built another one.",
                "Build a new one with train_step(spec).",
            )
        drawn = self._draw(microbatches)
        shares, factors = self._shares(drawn)
        trees = [Tree(item) for item in drawn]
        if self.executor is None:
            self._tree, self._shapes = trees[0], shapes(trees[0].tensors)
        inputs = self._inputs(trees, factors)
        if self.executor is None:
            self._compile(inputs)
        else:
            self._check_modes()
            if self.optimizer.changed():
                self.executor.setOptimizer(self.optimizer.device)
        with acquiring():
            _, losses, *logged = self.executor(*inputs)
        self.optimizer.stepped()
        assert self._module is not None
        self._module.notes.replay([_mean(each) for each in logged])
        return StepResult(self._window_loss(losses, shares), applied=True)

    def _draw(self, microbatches: Collection[Any]) -> list[Any]:
        count, most = len(microbatches), self._spec.accumulate
        if not 0 < count <= most:
            raise DataError(
                f"A window of {count} microbatches was given to a step that takes 1 to {most}.",
                "Skip empty windows." if count == 0 else "Give at most StepSpec.accumulate.",
            )
        drawn = []
        for item in microbatches:
            drawn.append(item)
            if len(drawn) > count:
                break
        if len(drawn) != count:
            raise DataError(
                f"A window said that it holds {count} microbatches, and yielded another number.",
                "Let its len() be the number of microbatches that iterating over it yields.",
            )
        return drawn

    def _shares(self, drawn: list[Any]) -> tuple[list[float], list[float]]:
        """Of each microbatch: its share of this rank's window, and its factor in the program.

        The program divides by the number of microbatches that it was compiled for, so a factor of
        one is a full window of equals.
        """
        count, most = len(drawn), self._spec.accumulate
        weigh = self._spec.weight
        if weigh is None or (count == 1 and not self._weigh_ranks):
            return [1.0 / count] * count, [most / count] * count
        weights = [_usable_weight(weigh(item)) for item in drawn]
        mine = total = sum(weights)
        if self._weigh_ranks:
            context = self._owner.context
            summed = context.collectives.all_reduce(torch.tensor(mine), ReduceOp.SUM)
            total = float(summed) / context.world.size
        if not total:
            raise DataError(
                "The weights of all microbatches of a window are zero.",
                "Leave out microbatches that hold nothing.",
            )
        return [w / (mine or 1.0) for w in weights], [w / total * most for w in weights]

    def _inputs(self, trees: list[Tree], factors: list[float]) -> list[Tensor]:
        """What the program takes, a window that is too short filled up with what counts nothing."""
        programs = self._owner.programs
        assert self._tree is not None
        for tree in trees:
            if tree.form != self._tree.form or not _equal(tree.constants, self._tree.constants):
                raise DataError(
                    "A microbatch holds other containers, or other values that are no tensors, "
                    "than the first one, and an IPU's program is compiled for what that one held.",
                    "Give batches of tensors alone, all made alike.",
                )
            if shapes(tree.tensors) != self._shapes:
                raise DataError(
                    f"A microbatch holds tensors of shapes {_words(shapes(tree.tensors))}, and the "
                    f"program is compiled for {_words(self._shapes)}.",
                    "Give batches of one size, such as by drop_last=True in the loader.",
                )
        check_rows(trees[0].tensors, programs.training_parts, "replicas and device iterations")
        missing = self._spec.accumulate - len(trees)
        filled = [tree.tensors for tree in (*trees, *[trees[-1]] * missing)]
        made = joined(filled, programs.options.device_iterations)
        if not self._weighted:
            return made
        rows = torch.tensor([*factors, *[0.0] * missing]).repeat_interleave(programs.replicas)
        return [*made, rows.repeat(programs.options.device_iterations)]

    def _compile(self, inputs: list[Tensor]) -> None:
        """Make the program, and give it the optimizer state that was loaded meanwhile."""
        spec, owner = self._spec, self._owner
        assert self._tree is not None
        self._module = TrainModule(
            spec.module, spec.loss, self._precision, owner.sdk, self._tree, weighted=self._weighted
        )
        options = training_options(owner.sdk, owner.programs, spec.accumulate)
        self.optimizer.adopt()
        executor = owner.sdk.trainingModel(self._module, options, self.optimizer.device)
        try:
            with acquiring():
                executor.compile(*inputs)
            self.optimizer.push(spec.module)
        except BaseException:
            if executor.isCompiled():
                executor.destroy()
            _unwrap(self._module)
            raise
        self.executor = executor
        self._modes = modes(spec.module)
        owner.compiled(executor)

    def _check_modes(self) -> None:
        now = tuple(module.training for module in self._modules)
        if now != self._modes:
            changed = next(
                n for n, (a, b) in enumerate(zip(now, self._modes, strict=True)) if a != b
            )
            raise UserCodeError(
                f"{type(self._modules[changed]).__name__} is in {_mode(now[changed])} now, and the "
                f"program was compiled in {_mode(self._modes[changed])}.",
                "Set modes before the first step, or build a new step.",
            )

    def _window_loss(self, losses: Tensor, shares: list[float]) -> Tensor:
        """The mean over this rank's window, from the losses of all parts of the program's call."""
        programs, most = self._owner.programs, self._spec.accumulate
        table = losses.detach().float().reshape(-1, most, programs.replicas)
        if most == 1:
            return table.mean()
        each = table.mean(dim=(0, 2))[: len(shares)]
        return (each * torch.tensor(shares)).sum()


class IpuEvalStep:
    """The user's function without gradients, as programs: one for each kind of batch.

    Args:
        spec: What to evaluate.
        precision: The numeric format.
        owner: The strategy.
    """

    def __init__(self, spec: EvalSpec, precision: Precision, owner: IpuStrategy) -> None:
        self._spec = spec
        self._precision = precision
        self._owner = owner
        self._programs: list[_Program] = []
        self._current: _Program | None = None

    def __enter__(self) -> Self:
        """Take the device from training, whose weights come to the host with that."""
        self._owner.pause_training()
        return self

    def __exit__(self, *exc: object) -> None:
        self._attach(None)
        self._owner.resume_training()

    def __call__(self, *args: Any) -> Any:
        """Evaluate one batch.

        Raises:
            DataError: Batches are of more kinds than programs may be compiled.
            UnavailableError: The device is busy.
        """
        tree = Tree(args)
        check_rows(tree.tensors, self._owner.programs.inference_parts, "replicas")
        inputs = joined([tree.tensors], 1)
        wanted = (tree.form, shapes(tree.tensors), modes(self._spec.module))
        program = next((p for p in self._programs if p.fits(wanted, tree.constants)), None)
        if program is None:
            program = self._new(wanted, tree)
        self._attach(program)
        with acquiring():
            found = program.executor(*inputs)
        return program.module.record.returned(found)

    def release(self) -> None:
        """Forget all programs."""
        self._attach(None)
        for program in self._programs:
            program.executor.destroy()
        self._programs = []

    def _new(self, wanted: Any, tree: Tree) -> _Program:
        if len(self._programs) == MOST_PROGRAMS:
            read = [p for p in self._programs if p.module.record.read()]
            what = "batches differ in shape, containers or values that are no tensors"
            if read:
                what = "it reads a number among its arguments, such as that of the batch"
            raise DataError(
                f"An evaluation needs more than {MOST_PROGRAMS} programs: {what}.",
                "Give batches of one size (drop_last=True), and leave numbers to hooks.",
            )
        owner = self._owner
        self._attach(None)
        module = EvalModule(self._spec.module, self._spec.function, self._precision, tree)
        options = inference_options(owner.sdk, owner.programs)
        program = _Program(wanted, module, owner.sdk.inferenceModel(module, options))
        self._programs.append(program)
        return program

    def _attach(self, program: _Program | None) -> None:
        """Load a program onto the device in place of the one that is there, with new weights."""
        if program is self._current:
            return
        before, self._current = self._current, program
        if before is not None and before.executor.isAttachedToDevice():
            before.executor.detachFromDevice()
        if program is not None and program.executor.isCompiled():
            with acquiring():
                program.executor.attachToDevice()


class _Program:
    """An evaluation that is compiled, or about to be.

    Args:
        wanted: Structure, shapes and modes that it is for.
        module: What it was traced from.
        executor: PopTorch's.
    """

    def __init__(self, wanted: Any, module: EvalModule, executor: Any) -> None:
        self._wanted = wanted
        self.module = module
        self.executor = executor

    def fits(self, wanted: Any, constants: list[Any]) -> bool:
        """Whether a batch is of its kind. A number that nobody read may be another one."""
        read = self.module.record.read()
        mine = self.module.record.constants
        return bool(wanted == self._wanted) and all(
            _equal([a], [b]) or (type(a) is int and type(b) is int and place not in read)
            for place, (a, b) in enumerate(zip(constants, mine, strict=True))
        )


def _unwrap(module: Any) -> None:
    """Undo PopTorch's wrapping where it does not: an executor that was never compiled keeps it."""
    for owner in module.modules():
        for table, kind in (
            (owner._parameters, torch.nn.Parameter),  # noqa: SLF001 - what PopTorch changed
            (owner._buffers, torch.Tensor),  # noqa: SLF001
        ):
            for value in table.values():
                if value is not None and type(value).__module__.startswith("poptorch"):
                    value.__class__ = kind
    if type(module).__name__.startswith("Poptorch"):
        module.__class__ = next(
            base for base in type(module).__mro__ if base.__module__ == TrainModule.__module__
        )


def _mean(values: Tensor) -> Tensor:
    return values.float().mean() if values.dim() else values


def _equal(mine: list[Any], theirs: list[Any]) -> bool:
    """Whether values that are no tensors are the same; what cannot be compared is not."""
    return len(mine) == len(theirs) and all(
        a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)
        for a, b in zip(mine, theirs, strict=True)
    )


_PLAIN = (str, bytes, int, float, bool, complex, torch.dtype, torch.device, frozenset)


def _usable_weight(weight: float) -> float:
    if not (weight >= 0 and math.isfinite(weight)):
        raise UserCodeError(
            f"The weight of a microbatch is {weight!r}.", "Return a finite number from 0 up."
        )
    return weight


def _words(found: Any) -> str:
    return ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in found) or "none"


def _mode(training: bool) -> str:  # noqa: FBT001 - the module's flag
    return "training mode" if training else "evaluation mode"
