"""Numeric formats. The rules are in docs/contracts/precision.md."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from drivetrain_interfaces import (
    CheckpointError,
    Precision,
    PrecisionPolicy,
    ReduceOp,
    UnsupportedError,
    UserCodeError,
)
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer


class DecidesTogether(Protocol):
    """What a decision of all ranks needs of their collectives."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        """The reduction over all ranks."""
        ...


#: Shared, since it holds nothing: entering it is all that a forward in full precision costs.
NOTHING = nullcontext()


class FullPrecision:
    """``"32-true"``: torch as it is. Also the base of a precision of one's own.

    Override what differs, and give it a ``name`` and a ``policy``.
    """

    name: str = "32-true"
    policy: PrecisionPolicy = PrecisionPolicy()

    def convert(self, module: nn.Module) -> nn.Module:
        """The module as the user built it."""
        return module

    def forward(self) -> AbstractContextManager[Any]:
        """A context that changes nothing."""
        return NOTHING

    def backward(self, loss: Tensor) -> None:
        """Backpropagate from a scalar loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Call ``prepare`` and update. Always applied."""
        prepare()
        for optimizer in optimizers:
            optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore; what another precision saved has no meaning here."""


class TruePrecision(FullPrecision):
    """``"16-true"``, ``"bf16-true"``, ``"64-true"``: parameters stored and used in one format.

    Floating inputs are cast where they meet parameters: each module that owns floating parameters
    gets a hook that casts floating tensors among its arguments. Targets never meet parameters, so
    they are never touched.

    Args:
        name: One of the three names.
    """

    _FORMATS = {  # noqa: RUF012 - never written
        "16-true": (torch.float16, nn.Module.half),
        "bf16-true": (torch.bfloat16, nn.Module.bfloat16),
        "64-true": (torch.float64, nn.Module.double),
    }

    def __init__(self, name: str) -> None:
        self.name = name
        self._dtype = self._FORMATS[name][0]
        text = str(self._dtype).removeprefix("torch.")
        self.policy = PrecisionPolicy(parameters=text, compute=text, reduce=text)

    def convert(self, module: nn.Module) -> nn.Module:
        """Cast floating parameters and buffers, in place, and install the hooks."""
        module = self._FORMATS[self.name][1](module)
        for part in module.modules():
            if any(p.is_floating_point() for p in part.parameters(recurse=False)):
                _install_cast(part, self._dtype)
        return module

    def forward(self) -> AbstractContextManager[Any]:
        """In ``64-true``, tensors that user code makes are float64 as well."""
        return _DefaultDtype(self._dtype) if self._dtype is torch.float64 else NOTHING


class _DefaultDtype:
    """The default dtype of new tensors, for the length of a ``with`` block."""

    __slots__ = ("_before", "_dtype")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self._before)


class _CastInputs:
    """A forward-pre-hook. A class, not a closure, so that a module with it pickles."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = self.dtype
        return (
            tuple(cast(value, dtype) for value in args),
            {key: cast(value, dtype) for key, value in kwargs.items()} if kwargs else kwargs,
        )


def cast(value: Any, dtype: torch.dtype) -> Any:
    """An argument of a module with floating tensors in that dtype, integers as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if type(value) is tuple or type(value) is list:  # the hidden state of a recurrent module
        return type(value)(cast(item, dtype) for item in value)
    return value


def _install_cast(module: nn.Module, dtype: torch.dtype) -> None:
    for hook in module._forward_pre_hooks.values():  # noqa: SLF001 - torch has no way to list them
        if isinstance(hook, _CastInputs):
            hook.dtype = dtype
            return
    module.register_forward_pre_hook(_CastInputs(dtype), prepend=True, with_kwargs=True)


class AutocastPrecision(FullPrecision):
    """``"bf16-mixed"``: parameters in float32, matrix products in bfloat16 by ``torch.autocast``.

    Args:
        autocast_type: The device type that ``torch.autocast`` wants.
    """

    name = "bf16-mixed"
    policy = PrecisionPolicy(compute="bfloat16")
    _dtype = torch.bfloat16

    def __init__(self, autocast_type: str) -> None:
        self._autocast_type = autocast_type
        self._fields: dict[str, Any] | None = None

    def forward(self) -> AbstractContextManager[Any]:
        """A new autocast context.

        A context keeps what it found on itself, so one that is shared would break when nested. But
        making one costs as much as using it; so the checks run once and the fields are copied.
        """
        if self._fields is None:
            self._fields = self._checked_fields()
        context = object.__new__(torch.autocast)
        context.__dict__.update(self._fields)
        return context

    def backward(self, loss: Tensor) -> None:
        """Backpropagate outside of autocast, even if called within it."""
        with self._outside():
            super().backward(loss)

    def step(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Call ``prepare`` and update outside of autocast. Always applied."""
        with self._outside():
            return super().step(optimizers, prepare)

    def _outside(self) -> AbstractContextManager[Any]:
        if torch.is_autocast_enabled(self._autocast_type):
            return torch.autocast(self._autocast_type, enabled=False)
        return NOTHING

    def _checked_fields(self) -> dict[str, Any]:
        refusal = UnsupportedError(
            f"Precision {self.name!r} was asked for, and torch.autocast does not offer "
            f"{self._dtype} on {self._autocast_type!r}.",
            "Use '32-true', or a device that has it.",
        )
        try:
            fields = vars(torch.autocast(self._autocast_type, dtype=self._dtype))
        except RuntimeError as error:
            raise refusal from error
        # Where torch only warns and turns itself off, the user's setting would be ignored.
        if not fields["_enabled"]:
            raise refusal
        return fields


class ScaledAutocastPrecision(AutocastPrecision):
    """``"16-mixed"``: parameters in float32, products in float16, and a loss that is scaled.

    An update whose gradients are not finite is not applied, and the scale shrinks.

    Args:
        autocast_type: The device type that ``torch.autocast`` wants.
        init_scale: The first scale.
        growth_factor: What the scale is multiplied by after ``growth_interval`` finite updates.
        backoff_factor: What it is multiplied by after an update that was not finite.
        growth_interval: Finite updates in a row before the scale grows.
    """

    name = "16-mixed"
    policy = PrecisionPolicy(compute="float16", loss_scaling=True)
    _dtype = torch.float16
    _others: DecidesTogether | None = None

    def __init__(
        self,
        autocast_type: str,
        *,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        super().__init__(autocast_type)
        self._settings: dict[str, Any] = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }
        # Optimizers that unscaled since the scale last changed. It changes only before the next
        # backward, so that two losses that went backward together are unscaled alike.
        self._unscaled: set[int] = set()

    @cached_property
    def _scaler(self) -> _Scaler:
        """Made in the process that trains: to make one, torch looks for the device."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns and goes on without a scale
            scaler = _Scaler(self._autocast_type, **self._settings)
        if not scaler.is_enabled():
            raise UnsupportedError(
                f"Precision {self.name!r} was asked for, and torch has no loss scaling for "
                f"{self._autocast_type!r} here.",
                "Use 'bf16-mixed' or '32-true'.",
            )
        return scaler

    def decide_with(self, collectives: DecidesTogether | None) -> None:
        """Reduce over ranks whether gradients are finite: an update is applied on all or on none.

        For strategies whose ranks hold gradients of different parameters. None undoes it.
        """
        self._others = collectives

    def __getstate__(self) -> dict[str, Any]:
        """Without the connection to other ranks, which belongs to a process."""
        return {key: value for key, value in self.__dict__.items() if key != "_others"}

    def convert(self, module: nn.Module) -> nn.Module:
        """The module as it is.

        Raises:
            UnsupportedError: It has parameters in float16, or the device has no loss scaling.
        """
        assert self._scaler
        halves = [name for name, p in module.named_parameters() if p.dtype is torch.float16]
        if halves:
            raise UnsupportedError(
                f"Precision '16-mixed' keeps parameters in float32, and {halves[0]!r} is float16.",
                "Build the module in float32, or use '16-true'.",
            )
        return module

    def backward(self, loss: Tensor) -> None:
        """Backpropagate from the loss times the scale."""
        if self._unscaled:
            self._settle()
        super().backward(self._scaler.scale(loss))

    def step(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Unscale, call ``prepare``, and update all optimizers or, if not finite, none."""
        scaler = self._scaler
        mine = {id(optimizer) for optimizer in optimizers}
        if not self._unscaled.isdisjoint(mine):
            self._settle()
        if not scaler.started:
            raise UserCodeError(
                "An update in precision '16-mixed' was asked for before any backward through it.",
                "Call the step's backward(loss) instead of loss.backward().",
            )
        with self._outside():
            self._unscaled |= mine
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            prepare()
            applied = scaler.is_finite(optimizers, self._others)
            if applied:
                for optimizer in optimizers:
                    optimizer.step()
        return applied

    def state_dict(self) -> dict[str, Any]:
        """The scale and what it follows."""
        self._settle()
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scale. A state that is empty, from a run without a scale, changes nothing.

        Raises:
            CheckpointError: It is the state of something else.
        """
        if not state:
            return
        wanted = self._scaler.state_dict().keys()
        if wanted != state.keys():
            raise CheckpointError(
                f"The state of precision '16-mixed' needs {listed(wanted)}; "
                f"the checkpoint holds {listed(state)}.",
                "Resume with the precision that the checkpoint was saved with.",
            )
        self._settle()
        self._scaler.load_state_dict(dict(state))

    def _settle(self) -> None:
        self._scaler.settle()
        self._unscaled.clear()


class ShardedScaledPrecision(ScaledAutocastPrecision):
    """``"16-mixed"`` that always decides with all ranks of torch's default process group.

    For a strategy of one's own whose ranks hold gradients of different parameters, and that does
    not call ``decide_with``. Arguments are those of ``ScaledAutocastPrecision``.
    """

    def step(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Unscale, call ``prepare``, and update all optimizers on all ranks or none on any."""
        if self._others is None and dist.is_available() and dist.is_initialized():
            self.decide_with(_DefaultGroup())
        return super().step(optimizers, prepare)


class _DefaultGroup:
    """The one operation that a decision needs, over torch's default process group."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        assert op is ReduceOp.MAX
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor


class _Scaler(torch.amp.GradScaler):
    """Torch's scaler, with the update decided for all optimizers at once and by one read."""

    _per_optimizer_states: dict[int, dict[str, Any]]

    @property
    def started(self) -> bool:
        """Whether a loss was scaled."""
        return self._scale is not None

    def is_finite(self, optimizers: Sequence[Optimizer], others: DecidesTogether | None) -> bool:
        """Whether all their gradients were. The only moment that waits for the device."""
        flags = [
            flag
            for optimizer in optimizers
            for flag in self._found_inf_per_device(optimizer).values()
        ]
        if others is not None:
            return self._is_finite_everywhere(optimizers, flags, others)
        if not flags:
            return True
        home = flags[0].device
        return not sum(flag.to(home, non_blocking=True) for flag in flags)

    def _is_finite_everywhere(
        self, optimizers: Sequence[Optimizer], flags: list[Tensor], others: DecidesTogether
    ) -> bool:
        """The same, with the flags of all ranks. A rank without any gradient has a say as well."""
        assert self._scale is not None
        flag = torch.zeros_like(self._scale)
        for mine in flags:
            flag = torch.maximum(flag, mine.to(flag.device).reshape(flag.shape))
        flag = others.all_reduce(flag, ReduceOp.MAX)
        for optimizer in optimizers:  # the scale follows what was found anywhere
            states = self._per_optimizer_states[id(optimizer)]
            states["found_inf_per_device"] = {flag.device: flag}
        return not flag

    def settle(self) -> None:
        """Let the scale follow what was found since it last did."""
        states = self._per_optimizer_states
        if any(state["found_inf_per_device"] for state in states.values()):
            self.update()
        states.clear()  # also of optimizers that had no gradient to look at


def make_precision(name: str, autocast_type: str) -> Precision:
    """The precision of that name.

    Args:
        name: One of ``drivetrain_toolkit.specs.PRECISIONS``.
        autocast_type: The device type that ``torch.autocast`` wants.

    Raises:
        UnsupportedError: There is none of that name.
    """
    makers: dict[str, Callable[[], Precision]] = {
        "32-true": FullPrecision,
        "16-true": partial(TruePrecision, "16-true"),
        "bf16-true": partial(TruePrecision, "bf16-true"),
        "64-true": partial(TruePrecision, "64-true"),
        "bf16-mixed": partial(AutocastPrecision, autocast_type),
        "16-mixed": partial(ScaledAutocastPrecision, autocast_type),
    }
    if name not in makers:
        raise UnsupportedError(
            f"Precision {name!r} was asked for; there is {listed(makers)}.",
            "Use one of these names.",
        )
    return makers[name]()
