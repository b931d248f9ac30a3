"""Any strategy, with a faster step and a better word when memory runs out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from drivetrain_interfaces import SupportsManualStep, SupportsStreams, UnsupportedError

from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.feeding import SideStreamFeed
from drivetrain_toolkit.fused import use_fused
from drivetrain_toolkit.memory import explained
from drivetrain_toolkit.strategies.eager import EagerStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        ModelState,
        StepSpec,
        Strategy,
        StrategyContext,
        StrategyFactory,
        TrainStep,
    )
    from torch import nn
    from torch.optim import Optimizer
    from typing_extensions import Self


class Tuned:
    """A strategy around another one: ``Tuned(DDPStrategy(), compile=True, fused=True)``.

    Where a device's memory runs out, the error says what holds it.

    Args:
        strategy: The strategy that does the work, unbound.
        compile: Compile the loss of a step, with what it calls: True, or ``CompileOptions``.
        fused: Let optimizers update all parameters in one kernel.
        prefetch: Copy batches beside the work, on devices whose accelerator has a stream for that.
    """

    _inner: Any

    def __init__(
        self,
        strategy: StrategyFactory | Strategy,
        *,
        compile: bool | CompileOptions | None = None,  # noqa: A002 - what users call it
        fused: bool = False,
        prefetch: bool = True,
    ) -> None:
        self._inner = strategy
        self._compile = CompileOptions() if compile is True else compile or None
        self._fused = fused
        self._prefetch = prefetch
        self._module: nn.Module | None = None
        self._optimizers: tuple[Optimizer, ...] = ()
        self._context: StrategyContext | None = None
        self._feeding: SideStreamFeed | None = None
        self._outside: tuple[nn.Module, tuple[str, ...]] | None = None

    def __call__(self, context: StrategyContext) -> Self:
        """A copy around the bound strategy; this object stays as it is."""
        bound, inner = copy.copy(self), self._inner
        if isinstance(inner, EagerStrategy) and inner.prefetch != self._prefetch:
            inner = copy.copy(inner)
            inner.prefetch = self._prefetch
        bound._inner = inner(context)  # noqa: SLF001 - our own copy
        bound._context = context  # noqa: SLF001
        accelerator = context.accelerator
        # An eager strategy does it itself.
        alone = not isinstance(bound._inner, EagerStrategy)  # noqa: SLF001
        if alone and self._prefetch and isinstance(accelerator, SupportsStreams):
            bound._feeding = SideStreamFeed(accelerator, bound._inner.device)  # noqa: SLF001
        # Optional abilities of the strategy are looked for as methods.
        kind = type(bound._inner)  # noqa: SLF001
        for name in dir(kind):
            if name.startswith("_") or hasattr(type(self), name):
                continue
            if callable(getattr(kind, name)):
                setattr(bound, name, getattr(bound._inner, name))  # noqa: SLF001
        return bound

    def __getattr__(self, name: str) -> Any:
        """What the strategy carries for the trainer, such as a launcher or devices."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def name(self) -> str:
        """The name of the strategy that does the work."""
        return str(self._inner.name)

    @property
    def device(self) -> torch.device:
        """Where batches of this process go."""
        device: torch.device = self._inner.device
        return device

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move and shard. Raises ``DeviceMemoryError`` if the module is too large."""
        self._module, self._optimizers = module, ()
        with _Explaining(self, "moving the module there"):
            self._module = self._inner.prepare(module)
        assert self._module is not None
        return self._module

    def feed(self, batch: Any) -> Any:
        """The batch on the device; the same object if it is there already."""
        with _Explaining(self, "moving a batch there"):
            return self._inner.feed(batch) if self._feeding is None else self._feeding(batch)

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            UnsupportedError: Fused optimizers were asked for, and there is one that is not.
        """
        if self._fused:
            use_fused(spec.optimizers)
        self._optimizers = tuple(spec.optimizers)
        self._take_back()
        if self._compile is not None:
            self._outside = (spec.module, self._compile.leave_out(spec.module))
        step = self._inner.train_step(replace(spec, loss=self._tuned(spec.loss)))
        return cast("TrainStep", _ExplainedStep(step, _Explaining(self, "a train step")))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step, which is not compiled."""
        step = self._inner.eval_step(spec)
        return _ExplainedStep(step, _Explaining(self, "an evaluation step"))

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step.

        Raises:
            UnsupportedError: The strategy offers none, or a compiled one was asked for.
        """
        if not isinstance(self._inner, SupportsManualStep):
            raise UnsupportedError(
                f"A manual step was asked for, which the strategy {self.name!r} does not offer.",
                "Use automatic optimization, or another strategy.",
            )
        if self._compile is not None:
            raise UnsupportedError(
                "A compiled manual step was asked for, and it is not known what to compile of it.",
                "Compile the parts yourself: module.net.compile().",
            )
        if self._fused:
            use_fused(spec.optimizers)
        self._optimizers = tuple(spec.optimizers)
        return self._inner.manual_step(spec)

    def state(self) -> ModelState:
        """Gather the state."""
        state: ModelState = self._inner.state()
        return state

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state."""
        self._inner.load(state, strict=strict)

    def close(self) -> None:
        """Undo wrapping and release the device. Safe to call twice."""
        self._module, self._optimizers = None, ()
        self._take_back()
        if self._context is not None:
            self._inner.close()

    def _take_back(self) -> None:
        if self._outside is not None:
            module, names = self._outside
            for name in names:
                module.__dict__.pop(name, None)
            self._outside = None

    def _tuned(self, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return loss if self._compile is None else self._compile(loss)

    def _explained(self, error: torch.OutOfMemoryError, doing: str, batch: Any) -> Exception:
        assert self._context is not None, "only a bound strategy uses a device"
        return explained(
            error,
            doing,
            self._context.accelerator,
            self.device,
            module=self._module,
            optimizers=self._optimizers,
            batch=batch,
        )


class _Explaining:
    """Around what may run out of memory. Holds nothing of one use, so one serves many."""

    __slots__ = ("_doing", "_owner")

    def __init__(self, owner: Tuned, doing: str) -> None:
        self._owner = owner
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: object,
    ) -> None:
        if type(error) is torch.OutOfMemoryError:
            raise self.error(error, None) from error

    def error(self, error: torch.OutOfMemoryError, batch: Any) -> Exception:
        """The error with what holds the memory."""
        return self._owner._explained(error, self._doing, batch)  # noqa: SLF001 - one module


class _ExplainedStep:
    """A step, train or evaluation, whose memory error says what holds the memory."""

    __slots__ = ("_explaining", "_step")

    def __init__(self, step: Any, explaining: _Explaining) -> None:
        self._step = step
        self._explaining = explaining

    def __call__(self, *args: Any) -> Any:
        try:
            return self._step(*args)
        except torch.OutOfMemoryError as error:
            raise self._explaining.error(error, _listed(args)) from error

    def __enter__(self) -> Self:
        self._step.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._step.__exit__(*exc)


def _listed(args: Sequence[Any]) -> Sequence[Any]:
    """What was drawn already: a window that moves batches when drawn is not drawn again."""
    return [arg for arg in args if isinstance(arg, (list, tuple, torch.Tensor))]
