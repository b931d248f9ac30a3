"""The toolkit's strategies as Gaudi wants them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.compiling import CompileOptions
from drivetrain_toolkit.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from drivetrain_toolkit.strategies.eager import EagerStrategy
from torch.distributed.fsdp import FSDPModule

from drivetrain_hpu import optimizers
from drivetrain_hpu.bridge import core, is_lazy
from drivetrain_hpu.graphs import Graphs
from drivetrain_hpu.steps import (
    FusedClip,
    KeptGradients,
    MarkedManualStep,
    MarkedStep,
    mark_backward,
    marking,
    windows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_interfaces import (
        EvalSpec,
        EvalStep,
        ManualSpec,
        ManualStep,
        ModelState,
        StepSpec,
        TrainStep,
    )
    from torch import nn

#: What ``torch.compile`` has to use here; its own default has no code generator for Gaudi.
COMPILER: Final = "hpu_backend"
_TORCHS_DEFAULT: Final = CompileOptions().backend
#: Torch's hooks that send gradients in another format, which HCCL devices do not support.
_COMPRESSING: Final = frozenset({"fp16_compress_hook", "bf16_compress_hook"})


@dataclass(frozen=True)
class HpuOptions:
    """Options that every strategy here takes besides its own.

    Attributes:
        compile: Compile the loss of a step, with what it calls, by the vendor's compiler.
        fused_clip: Clip to a norm by the vendor's fused kernel.
        graphs: Names of modules whose forward and backward are replayed as HPU graphs, in lazy
            mode, in one process, with shapes that stay the same.
    """

    compile: bool | CompileOptions = False
    fused_clip: bool = False
    graphs: tuple[str, ...] = ()


class OnHpu(EagerStrategy):
    """What the strategies here share. A class to mix in before one of the toolkit's."""

    _hpu: HpuOptions = HpuOptions()
    _graphs: Graphs | None = None
    _outside: tuple[nn.Module, tuple[str, ...]] | None = None

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step.

        Raises:
            UnsupportedError: An option excludes another, the mode, or the number of processes.
        """
        self._give_back()
        lazy = is_lazy()
        after: list[Callable[[Any], Any]] = []
        if self._hpu.compile:
            spec = self._compiled(spec, lazy=lazy)
        if self._hpu.graphs:
            spec = self._graphed(spec, after, lazy=lazy)
        if self._hpu.fused_clip and spec.clip is not None:
            clip = FusedClip(optimizers.fused_clip_norm(spec), spec.clip.value)
            spec = replace(spec, clip=None, hooks=clip.around(spec.hooks))
            after.append(clip.report)
        if lazy:
            mark = core().mark_step
            spec = mark_backward(spec, mark)
            after.append(marking(mark))
        return cast("TrainStep", windows(super().train_step(spec), after))

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step. Raises ``UnsupportedError`` for inference mode."""
        if spec.inference_mode:
            raise UnsupportedError(
                "An evaluation under torch.inference_mode was asked for, which the 'hpu' backend "
                "does not declare.",
                "Use inference_mode=False, which is torch.no_grad.",
            )
        step = super().eval_step(spec)
        if not is_lazy():
            return step
        return cast("EvalStep", MarkedStep(step, (marking(core().mark_step),)))

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step.

        Raises:
            UnsupportedError: An option was asked for that needs a step of ours.
        """
        asked = [item.name for item in fields(self._hpu) if getattr(self._hpu, item.name)]
        if asked:
            raise UnsupportedError(
                f"{listed(asked)} was asked of the strategy {self.name!r} with a manual step, of "
                "which it is not known what comes when.",
                "Leave it out, or use automatic optimization.",
            )
        step = super().manual_step(spec)
        return cast("ManualStep", MarkedManualStep(step, core().mark_step)) if is_lazy() else step

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state; ``CheckpointError`` names what does not fit."""
        super().load(state, strict=strict)
        for optimizer in self._optimizers:
            optimizers.carry_step_count(optimizer)

    def close(self) -> None:
        """Give modules back what was replaced in them, and release the rest."""
        self._give_back()
        super().close()

    def _configure(self, options: Mapping[str, Any]) -> None:
        mine = {item.name for item in fields(HpuOptions)}
        self._hpu = replace(self._hpu, **{k: v for k, v in options.items() if k in mine})
        if isinstance(self._hpu.graphs, str):
            raise ConfigurationError(
                f"graphs={self._hpu.graphs!r} was asked of the strategy {self.name!r}, and it is a "
                "list of names.",
                f"Write graphs=[{self._hpu.graphs!r}].",
            )
        super()._configure({k: v for k, v in options.items() if k not in mine})

    def _with_sync_batchnorm(self, module: nn.Module) -> nn.Module:
        raise UnsupportedError(
            "Batch statistics over all processes were asked for, which the 'hpu' backend does not "
            "declare.",
            "Set sync_batchnorm=False, or use group or layer normalization.",
        )

    def _compiled(self, spec: StepSpec, *, lazy: bool) -> StepSpec:
        if lazy:
            raise UnsupportedError(
                f"compile was asked of the strategy {self.name!r} in lazy mode, and "
                f"torch.compile(backend={COMPILER!r}) is for eager mode.",
                "Set PT_HPU_LAZY_MODE=0, or leave compile out.",
            )
        asked = self._hpu.compile
        options = asked if isinstance(asked, CompileOptions) else CompileOptions()
        if options.backend == _TORCHS_DEFAULT:
            options = replace(options, backend=COMPILER)
        if self.context.world.size > 1:
            # Splitting a graph at the buckets of DDP is not for this compiler.
            torch._dynamo.config.optimize_ddp = False  # noqa: SLF001 - documented, underscore or not
        self._outside = (spec.module, options.leave_out(spec.module))
        return replace(spec, loss=options(spec.loss))

    def _graphed(
        self, spec: StepSpec, after: list[Callable[[Any], Any]], *, lazy: bool
    ) -> StepSpec:
        if not lazy or self.context.world.size > 1:
            found = (
                f"there are {self.context.world.size} processes, whose gradient hooks no graph can "
                "hold"
                if lazy
                else "the bridge is in eager mode, which has none"
            )
            raise UnsupportedError(
                f"graphs was asked of the strategy {self.name!r}, and {found}.",
                "Use one process with PT_HPU_LAZY_MODE=1, or compile=True in eager mode.",
            )
        self._graphs = Graphs(spec.module, self._hpu.graphs, accumulates=spec.accumulate > 1)
        kept = KeptGradients()
        after.append(kept.restore)
        return replace(spec, hooks=kept.around(spec.hooks))

    def _give_back(self) -> None:
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None
        if self._outside is not None:
            module, names = self._outside
            for name in names:
                module.__dict__.pop(name, None)
            self._outside = None


class HpuSingleDevice(OnHpu, SingleDeviceStrategy):
    """One process, one Gaudi device. Options are those of ``HpuOptions``.

    Args:
        compile: Compile the loss of a step by the vendor's compiler.
        fused_clip: Clip to a norm by the vendor's fused kernel.
        graphs: Names of modules that become HPU graphs.
    """

    def __init__(
        self,
        *,
        compile: bool | CompileOptions = False,  # noqa: A002 - what users call it
        fused_clip: bool = False,
        graphs: Sequence[str] = (),
    ) -> None:
        self._hpu = HpuOptions(compile, fused_clip, tuple(graphs))


class HpuDDP(OnHpu, DDPStrategy):
    """Several processes, one Gaudi device each; gradients are averaged over HCCL.

    Args:
        gradient_as_bucket_view: Gradients are views into the buckets, as the vendor recommends.
        compile: Compile the loss of a step by the vendor's compiler.
        fused_clip: Clip to a norm by the vendor's fused kernel.
        graphs: Refused with several processes.
        options: The other options of ``DDPStrategy``, with its defaults.
    """

    def __init__(
        self,
        *,
        gradient_as_bucket_view: bool = True,
        compile: bool | CompileOptions = False,  # noqa: A002 - what users call it
        fused_clip: bool = False,
        graphs: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(gradient_as_bucket_view=gradient_as_bucket_view, **options)
        self._hpu = HpuOptions(compile, fused_clip, tuple(graphs))

    @property
    def device_ids(self) -> None:
        """None: a process has one device, and HCCL groups take no index."""
        return

    def _check(self) -> None:
        super()._check()
        hook = self._options.comm_hook
        name = getattr(hook, "__name__", "")
        if name in _COMPRESSING:
            raise UnsupportedError(
                f"comm_hook={name} was asked of the strategy {self.name!r}, and gradients on Gaudi "
                "cannot be sent in another format.",
                "Leave it out; precision='bf16-true' sends bfloat16.",
            )


class HpuFSDP(OnHpu, FSDPStrategy):
    """Parameters, gradients and optimizer state divided over ranks (FSDP2).

    Torch averages gradients by a reduction that HCCL does not have, so units are told to sum and
    divide. That takes torch 2.9 or newer.

    Args:
        compile: Compile the loss of a step by the vendor's compiler.
        options: The options of ``FSDPStrategy``.
    """

    name = "hpu_fsdp"

    def __init__(
        self,
        *,
        compile: bool | CompileOptions = False,  # noqa: A002 - what users call it
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._hpu = HpuOptions(compile)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, take over rank 0's values, and divide, unit by unit, in place.

        Raises:
            ConfigurationError: ``wrap`` names nothing, or a module cannot make its values.
            UnsupportedError: Units share a parameter, or torch is too old to sum.
        """
        if self.context.world.size > 1 and not hasattr(
            FSDPModule, "set_force_sum_reduction_for_comms"
        ):
            raise UnsupportedError(
                f"The strategy {self.name!r} was asked for with torch {torch.__version__}, whose "
                "sharded modules average by a reduction that HCCL does not have.",
                "Upgrade the Gaudi software to a release with torch 2.9, or use 'ddp'.",
            )
        prepared = super().prepare(module)
        for unit in self._units:
            unit.set_force_sum_reduction_for_comms(True)
        return prepared

    def _refuse_other_devices(self) -> None:
        """These are the devices that this class is for."""

    def _check(self) -> None:
        super()._check()
        if self._hpu.fused_clip or self._hpu.graphs:
            raise UnsupportedError(
                f"fused_clip or graphs was asked of the strategy {self.name!r}, whose parameters "
                "are divided over ranks.",
                "Leave them out, or use 'ddp'.",
            )


STRATEGIES: Final[Mapping[str, type[HpuSingleDevice | HpuDDP]]] = {
    "single_device": HpuSingleDevice,
    "ddp": HpuDDP,
}
