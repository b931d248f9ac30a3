"""Optimizer state divided over ranks; parameters and gradients whole on each (ZeRO stage 1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from drivetrain_interfaces import ConfigurationError, UnsupportedError

from drivetrain_toolkit.owners import gather_state, own_state, restore_state, update_of
from drivetrain_toolkit.specs import CAPABILITIES
from drivetrain_toolkit.strategies.ddp import DDPOptions, DDPStrategy

with warnings.catch_warnings():
    # The module compiles scripts for other optimizers, which newer versions of torch warn about.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

if TYPE_CHECKING:
    from drivetrain_interfaces import (
        ManualSpec,
        ManualStep,
        ModelState,
        StepSpec,
        TrainStep,
    )
    from torch import Tensor
    from torch.optim import Optimizer

    from drivetrain_toolkit.steps import Update


@dataclass(frozen=True)
class _Zero1Options(DDPOptions):
    parameters_as_bucket_view: bool = False


class Zero1Strategy(DDPStrategy):
    """DDP whose optimizer state is divided: each rank updates some parameters and sends them.

    Torch's ``ZeroRedundancyOptimizer`` does it, around the optimizers that the user built: they
    keep their groups, schedulers and hooks, and hold state for this rank's parameters only.

    Args:
        parameters_as_bucket_view: Parameters become views of one buffer per rank, which travels at
            once instead of parameter by parameter.
        options: Those of ``DDPStrategy``.
    """

    name = "zero1"
    capabilities: ClassVar = CAPABILITIES["zero1"]
    _can_part: ClassVar[bool] = False

    _divided: tuple[_Divided, ...] = ()

    def __init__(self, *, parameters_as_bucket_view: bool = False, **options: Any) -> None:
        super().__init__(**options)
        mine = {item.name: getattr(self._options, item.name) for item in fields(DDPOptions)}
        self._options = _Zero1Options(**mine, parameters_as_bucket_view=parameters_as_bucket_view)

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Raises ``UnsupportedError``."""
        self._refuse_manual()

    def state(self) -> ModelState:
        """The whole state on rank 0; the others help, and return an empty one."""
        if not self._divided:
            return super().state()
        return gather_state(self._divided, self._prepared(), self.context)

    def sharded_state(self) -> ModelState:
        """The module, and the optimizer states that this rank has; nothing is sent."""
        if not self._divided:
            return super().state()
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
        for each in self._divided:
            each.follow()

    def _check(self) -> None:
        super()._check()
        self._refuse_other_devices()

    def train_step(self, spec: StepSpec) -> TrainStep:
        """As for ``DDPStrategy``. Raises ``UnsupportedError`` if an optimizer needs a closure."""
        self._refuse_closures(spec)
        return super().train_step(spec)

    def _update(self, spec: StepSpec) -> Update | None:
        view = self._options.parameters_as_bucket_view
        self._divided = tuple(_Divided(each, bucket_view=view) for each in spec.optimizers)
        return update_of(self._divided, self.context.precision)

    def _release(self) -> None:
        super()._release()
        self._divided = ()


class _Divided(ZeroRedundancyOptimizer):
    """Torch's, around an optimizer object in the place of a class.

    While it steps, the object's groups hold this rank's parameters only; otherwise all.
    """

    def __init__(self, optimizer: Optimizer, *, bucket_view: bool) -> None:
        self.whole = optimizer.param_groups
        kinds = {(p.dtype, p.layout) for group in self.whole for p in group["params"]}
        if len(kinds) > 1:
            found = ", ".join(sorted(str(dtype) for dtype, _ in kinds))
            raise UnsupportedError(
                f"The strategy 'zero1' was given a {type(optimizer).__name__} over parameters of "
                f"several kinds ({found}), and it divides one kind.",
                "Give each kind an optimizer of its own, or use 'fsdp' or 'ddp'.",
            )
        self._count = sum(len(group["params"]) for group in self.whole)

        def narrowed(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
            optimizer.param_groups = self.mine = groups
            return optimizer

        try:
            super().__init__(
                [dict(group) for group in self.whole],
                cast("type[Optimizer]", narrowed),
                parameters_as_bucket_view=bucket_view,
            )
        finally:
            optimizer.param_groups = self.whole
        # The user and schedulers write to the optimizer's own groups; torch reads these.
        self.param_groups = self.whole

    @property
    def optimizer(self) -> Optimizer:
        """The user's."""
        return cast("Optimizer", self.optim)

    def owner(self, parameter: Tensor) -> int:
        """The rank that updates a parameter."""
        ranks: dict[Tensor, int] = self._param_to_rank  # type: ignore[attr-defined]
        return ranks[parameter]

    def owned(self) -> list[Tensor]:
        """The parameters that this rank updates."""
        return [p for group in self.mine for p in group["params"]]

    def follow(self) -> None:
        """Read the groups that the optimizer has now: loading a state gives it new ones."""
        self.whole = self.param_groups = self.optim.param_groups

    def step(self, closure: Any = None, **_: Any) -> None:  # type: ignore[override]
        """Update this rank's parameters and exchange all."""
        if sum(len(group["params"]) for group in self.whole) != self._count:
            raise ConfigurationError(
                f"A parameter was added to a {type(self.optim).__name__} after the train step of "
                "the strategy 'zero1' was built, so that no rank would update it.",
                "Add it in configure_optimizers, frozen if need be.",
            )
        assert closure is None
        self.optim.param_groups = self.mine
        try:
            super().step()
        finally:
            self.optim.param_groups = self.whole
