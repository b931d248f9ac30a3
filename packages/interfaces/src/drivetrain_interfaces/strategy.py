"""How a module is placed, stepped, and its state gathered. The step is one call."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from drivetrain_interfaces.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch
    from torch import nn
    from typing_extensions import Self

    from drivetrain_interfaces.accelerator import Accelerator
    from drivetrain_interfaces.cluster import World
    from drivetrain_interfaces.collectives import Collectives
    from drivetrain_interfaces.contract import ContractVersion
    from drivetrain_interfaces.precision import Precision


@dataclass(frozen=True, slots=True)
class StrategyContext:
    """What a strategy is built from, in the process that uses it.

    Attributes:
        device_index: The device of this process, or the first of those that it drives.
        devices: Indices of all devices of this machine that the run uses, for strategies that
            drive several from one process; empty where nobody said.
    """

    accelerator: Accelerator
    device_index: int
    world: World
    collectives: Collectives
    precision: Precision
    sync_batchnorm: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Clip:
    """Gradient clipping.

    Attributes:
        value: The largest total norm, or the largest absolute element.
        by: ``"norm"`` or ``"value"``.
    """

    value: float
    by: str = "norm"


@dataclass(frozen=True, slots=True)
class StepHooks:
    """User code inside a step. None where the user overrides nothing, so that it costs nothing."""

    before_backward: Callable[[torch.Tensor], None] | None = None
    after_backward: Callable[[], None] | None = None
    before_optimizer_step: Callable[[Sequence[torch.optim.Optimizer]], None] | None = None
    before_zero_grad: Callable[[Sequence[torch.optim.Optimizer]], None] | None = None


@dataclass(frozen=True, slots=True)
class StepSpec:
    """Everything a backend needs to build a train step, fixed before the first batch.

    A field that came after contract 0.1 says so in its metadata (``since``); a value other than its
    default is refused for a backend that is older than the field (``refuse_what_is_newer``).

    Attributes:
        module: The module that ``Strategy.prepare`` returned.
        optimizers: What updates it. All of them update on the one loss of a window.
        loss: Called with ``module`` and one microbatch; returns the undivided scalar loss.
        accumulate: The most microbatches that one call takes. A tail window holds fewer.
        clip: Gradient clipping, or None.
        hooks: User code inside the step.
        weight: The weight of a microbatch, such as its number of samples or tokens; None counts
            every microbatch alike. Not asked for a window of one, unless ranks have a say.
        weight_over_ranks: Whether weights differ between ranks, so that the total is theirs.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    accumulate: int = 1
    clip: Clip | None = None
    hooks: StepHooks = field(default_factory=StepHooks)
    weight: Callable[[Any], float] | None = None
    weight_over_ranks: bool = False


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """Everything a backend needs to build an evaluation step.

    Attributes:
        module: The module that ``Strategy.prepare`` returned.
        function: Called with ``module`` and the arguments of the step.
        inference_mode: ``torch.inference_mode`` if True, ``torch.no_grad`` if not.
    """

    module: nn.Module
    function: Callable[..., Any]
    inference_mode: bool = True


@dataclass(frozen=True, slots=True)
class ManualSpec:
    """Everything a backend needs to build a manual step.

    Attributes:
        module: The module that ``Strategy.prepare`` returned.
        optimizers: What the user's code will step.
        function: Called with ``module`` and the arguments of the step.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step. Tensors stay on the device, so that nothing waits for them.

    Attributes:
        loss: Scalar, detached, undivided, unscaled: the weighted mean over the window.
        applied: Whether the optimizers updated. Counters, schedulers and triggers follow it.
        grad_norm: Total norm before clipping, scalar, when clipping by norm; else None.
    """

    loss: torch.Tensor
    applied: bool
    grad_norm: torch.Tensor | None = None


@runtime_checkable
class TrainStep(Protocol):
    """Forward, backward and update as one call, so that a compiler may own all three.

    ``with step:`` attaches it to the device; leaving detaches it.
    """

    def __call__(self, microbatches: Collection[Any]) -> StepResult:
        """Train on one window. Draws each microbatch once, in order, when it is about to use it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class EvalStep(Protocol):
    """The user's evaluation function without gradients. A context manager like ``TrainStep``."""

    def __call__(self, *args: Any) -> Any:
        """Evaluate one batch; returns what the user's function returned."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class ManualStep(Protocol):
    """For code that calls backward and the optimizers itself, such as GANs and own loops."""

    def __call__(self, *args: Any) -> Any:
        """Run the user's function in the precision's forward context."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate from a scalar loss, scaled if the precision needs it."""
        ...

    def update(
        self, optimizer: torch.optim.Optimizer, clip: Clip | None = None
    ) -> StepResult | None:
        """Average gradients over ranks, unscale, clip, step. The result has no loss of its own."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelState:
    """The state of a module and its optimizers, independent of strategy and world size.

    Attributes:
        module: Full tensors by the name they have in the user's ``module.state_dict()``.
        optimizers: One per optimizer: ``{"state": {parameter name: {key: value}}, "groups":
            [{"parameters": [names], hyperparameters…}]}``.
        precision: What ``Precision.state_dict`` returned.
    """

    module: Mapping[str, Any]
    optimizers: Sequence[Mapping[str, Any]] = ()
    precision: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Strategy(Protocol):
    """How a module is placed, wrapped and stepped, and how its state is gathered.

    Order of calls: ``prepare``, then the user's optimizers are built from the module it returned,
    then ``train_step`` (or ``eval_step``) and ``load``, steps, ``state``, and ``close``.
    """

    @property
    def device(self) -> torch.device:
        """Where batches of this process go."""
        ...

    def prepare(self, module: nn.Module) -> nn.Module:
        """Convert, move and shard; returns the module that optimizers are built from."""
        ...

    def feed(self, batch: Any) -> Any:
        """The batch on the device: tensors inside lists, tuples, mappings and dataclasses."""
        ...

    def train_step(self, spec: StepSpec) -> TrainStep:
        """Build the train step. Raises ``UnsupportedError`` for what it cannot do."""
        ...

    def eval_step(self, spec: EvalSpec) -> EvalStep:
        """Build an evaluation step."""
        ...

    def state(self) -> ModelState:
        """Gather the state. Every rank calls it; every rank may get the whole or only rank 0."""
        ...

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any world size; ``CheckpointError`` names what does not fit."""
        ...

    def close(self) -> None:
        """Undo wrapping and release the device. Safe to call twice."""
        ...


@runtime_checkable
class SupportsManualStep(Protocol):
    """A strategy that offers manual optimization (``Feature.MANUAL_STEP``)."""

    def manual_step(self, spec: ManualSpec) -> ManualStep:
        """Build the manual step."""
        ...


@runtime_checkable
class SupportsShardedState(Protocol):
    """A strategy whose state need not be gathered: each rank has its part."""

    def sharded_state(self) -> ModelState:
        """As ``state``, with what this rank holds: a ``Shard`` for each partitioned tensor.

        The tensors are copies on the host. Parts of the state that only one rank has, such as an
        optimizer's for a parameter, are in that rank's mapping alone.
        """
        ...

    def load_sharded(self, state: ModelState, *, strict: bool = True) -> None:
        """As ``load``, of a state with a ``StoredTensor`` for each tensor; reads what it needs."""
        ...


class StrategyFactory(Protocol):
    """What ``StrategySpec.load`` returns. A configured, unbound strategy object may be one too."""

    def __call__(self, context: StrategyContext) -> Strategy:
        """Build the strategy in the process that uses it."""
        ...


def refuse_what_is_newer(spec: StepSpec, owner: str, contract: ContractVersion) -> None:
    """Stop a setting that an older backend would ignore without a word.

    Raises:
        UnsupportedError: A field younger than ``contract`` has a value other than its default.
    """
    for item in fields(spec):
        added = item.metadata.get("since")
        if added is None or added <= contract or getattr(spec, item.name) == item.default:
            continue
        raise UnsupportedError(
            f"{owner} was written for contract {contract} and does not know {item.name!r}, "
            f"which came in {added}.",
            f"Upgrade {owner.split(maxsplit=1)[0]}, or leave {item.name} unset.",
        )
