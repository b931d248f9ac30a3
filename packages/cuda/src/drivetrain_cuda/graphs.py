"""Parts of a network whose forward and backward are replayed as CUDA graphs.

A graph holds kernels and no Python, so only what is pure tensor work may become one: modules of
the network, by name. What the user's step does around them (logging, the loss, hooks) runs each
time, and so do clipping, the loss scale and the optimizer.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_toolkit.tuned import Tuned
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from drivetrain_interfaces import (
        ManualSpec,
        ManualStep,
        StepSpec,
        Strategy,
        StrategyFactory,
        TrainStep,
    )
    from drivetrain_toolkit.compiling import CompileOptions

    Key = tuple[tuple[torch.Size, torch.dtype, bool], ...]


class Graphed(Tuned):
    """``Tuned``, with modules that are replayed as CUDA graphs: one process, fixed shapes.

    The first training forward of a module captures its graph, for the shapes that it is called
    with. Calls with other shapes, and evaluation, run as usual. The results of a graph are in
    memory that its next forward overwrites: use them before the next batch.

    ``Tuned(..., compile=CompileOptions(mode="reduce-overhead"))`` makes graphs of its own.

    Args:
        strategy: The strategy that does the work, unbound.
        modules: Names of modules of the network, as in ``named_modules()``.
        fused: As for ``Tuned``.
        prefetch: As for ``Tuned``.
        compile: Refused, since a compiler makes its own graphs.

    Raises:
        ConfigurationError: No module is named, or ``compile`` is given.
    """

    def __init__(
        self,
        strategy: StrategyFactory | Strategy,
        modules: Sequence[str],
        *,
        fused: bool = False,
        prefetch: bool = True,
        compile: bool | CompileOptions | None = None,  # noqa: A002 - the name in Tuned
    ) -> None:
        if compile:
            raise ConfigurationError(
                "Graphed(..., compile=...) was asked for, and a compiler makes graphs of its own.",
                "Use Tuned(..., compile=CompileOptions(mode='reduce-overhead')).",
            )
        if not modules or isinstance(modules, str):
            raise ConfigurationError(
                f"Graphed(modules={modules!r}) was asked for, which names no module in a list.",
                "Give names such as ['encoder', 'decoder'].",
            )
        super().__init__(strategy, fused=fused, prefetch=prefetch)
        self._names = tuple(modules)
        self._graphed: list[_GraphedForward] = []

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            ConfigurationError: The network has no module of a name.
            UnsupportedError: There are several processes.
        """
        if self._context is not None and self._context.world.size > 1:
            raise UnsupportedError(
                f"CUDA graphs were asked for in a world of {self._context.world.size}, where "
                "watching over NCCL breaks off the capture.",
                "Use devices=1, or Tuned(..., compile=CompileOptions(mode='reduce-overhead')).",
            )
        self._release()
        known = dict(spec.module.named_modules())
        for name in self._names:
            if name not in known:
                raise ConfigurationError(
                    f"Graphed(..., modules=[{name!r}]) was asked for, and the network has "
                    f"{', '.join(repr(one) for one in known if one)}.",
                    "Name some of these.",
                )
        self._graphed = [_GraphedForward(name, known[name]) for name in self._names]
        return super().train_step(spec)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Refused: what is called between forwards is not known. Raises ``UnsupportedError``."""
        raise UnsupportedError(
            "CUDA graphs were asked for with a manual step, whose forwards may overwrite each "
            "other's results.",
            "Use Tuned, or automatic optimization.",
        )

    def close(self) -> None:
        """Give the modules their own forwards back, and release the device."""
        self._release()
        super().close()

    def _release(self) -> None:
        for one in self._graphed:
            one.release()
        self._graphed = []


class _GraphedForward:
    """Stands in for the forward of one module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module
        self._eager = module.forward
        self._key: Key | None = None
        self._graph: Callable[..., Any] | None = None
        self._told = False
        module.forward = self  # what nn.Module calls; hooks of the module run around it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the graph, if this is a training forward with the shapes that it was made for."""
        if not (self._module.training and torch.is_grad_enabled()):
            return self._eager(*args, **kwargs)
        if kwargs or not all(isinstance(value, Tensor) for value in args):
            raise UnsupportedError(
                f"The module {self._name!r} was to be a CUDA graph, and is called with "
                f"{', '.join(self._others(args, kwargs))}, which is no positional tensor.",
                "Name modules inside of it that take tensors only, or leave it out.",
            )
        key = tuple((value.shape, value.dtype, value.requires_grad) for value in args)
        if self._graph is None:
            self._key, self._graph = key, captured(self._module, self._eager, args)
        if key == self._key:
            return self._graph(*args)
        if not self._told:
            self._told = True
            warnings.warn(
                f"The module {self._name!r} is a CUDA graph for the shapes "
                f"{[tuple(shape) for shape, _, _ in self._key or ()]}; for others, such as "
                f"{[tuple(value.shape) for value in args]}, it runs as usual.",
                stacklevel=2,
            )
        return self._eager(*args)

    def release(self) -> None:
        """Give the module its own forward back, and drop the graph with its memory."""
        if self._module.__dict__.get("forward") is self:
            del self._module.__dict__["forward"]
        self._graph = None

    @staticmethod
    def _others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
        yield from (f"{name}=" for name in kwargs)
        yield from (f"a {type(v).__name__}" for v in args if not isinstance(v, Tensor))


class _Body(nn.Module):
    """The module for ``make_graphed_callables``, which wants one without hooks of its own."""

    def __init__(self, module: nn.Module, eager: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = module
        self._eager = eager

    def forward(self, *args: Tensor) -> Any:
        """The module's own forward."""
        return self._eager(*args)


def captured(
    module: nn.Module, eager: Callable[..., Any], args: tuple[Tensor, ...]
) -> Callable[..., Any]:
    """A forward that replays the module's graph, and its backward likewise.

    Torch runs the module a few times before it captures, so buffers such as running statistics are
    set back afterwards. Autocast must not remember casts across the capture.

    Args:
        module: Whose parameters and buffers take part.
        eager: Its forward.
        args: Of the call that it is made for; they are copied.
    """
    samples = tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in args)
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    kind = args[0].device.type if args else "cuda"
    with torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    ):
        made: Callable[..., Any] = torch.cuda.make_graphed_callables(_Body(module, eager), samples)
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)
    return made
