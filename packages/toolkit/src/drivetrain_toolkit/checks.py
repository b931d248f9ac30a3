"""What a step refuses: specs that cannot be met, and what user code returned."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import (
    ClusterError,
    ConfigurationError,
    DataError,
    ReduceOp,
    UnsupportedError,
    UserCodeError,
)
from torch import Tensor

from drivetrain_toolkit.clipping import check_clip

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from drivetrain_interfaces import Collectives, Precision, StepSpec
    from torch.optim import Optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` cannot be called without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_spec(spec: StepSpec, precision: Precision) -> None:
    """Refuse a spec that no eager step can meet.

    Raises:
        ConfigurationError: It has no optimizer, or a number in it is out of range.
        UnsupportedError: Its clipping is unknown, or its optimizers cannot share a loss scale.
    """
    if not spec.optimizers:
        raise ConfigurationError(
            "A train step without an optimizer was asked for.", "Give it at least one."
        )
    if spec.accumulate < 1:
        raise ConfigurationError(
            f"accumulate={spec.accumulate!r} was asked for.", "Give 1 or more."
        )
    check_clip(spec.clip)
    if precision.policy.loss_scaling and len(spec.optimizers) > 1:
        owned = [p for o in spec.optimizers for g in o.param_groups for p in g["params"]]
        if len({id(p) for p in owned}) < len(owned):
            raise UnsupportedError(
                f"Two optimizers share a parameter, and precision {precision.name!r} would unscale "
                "its gradient twice.",
                "Give every parameter to one optimizer, or use a precision without a loss scale.",
            )


def counted(microbatches: Collection[Any], count: int) -> Iterator[tuple[Any, bool]]:
    """Each microbatch and whether it is the last. It must be known: ranks average at the last."""
    index = 0
    for index, microbatch in enumerate(microbatches, 1):
        if index > count:
            raise miscounted(count)
        yield microbatch, index == count
    if index < count:
        raise miscounted(count)


def miscounted(count: int) -> DataError:
    """The error for a window that does not yield ``count`` microbatches."""
    return DataError(
        f"A window said that it holds {count} microbatches, and yielded another number.",
        "Let its len() be the number of microbatches that iterating over it yields.",
    )


def usable_weight(weight: float) -> float:
    """The weight of a microbatch, if it can be one. Raises ``UserCodeError`` if not."""
    if not (weight >= 0 and math.isfinite(weight)):
        raise UserCodeError(
            f"The weight of a microbatch is {weight!r}.", "Return a finite number from 0 up."
        )
    return weight


def usable_loss(loss: Any) -> Tensor:
    """The loss as a scalar, if it can be one; only asked when the quick look found something.

    Raises:
        UserCodeError: It is no tensor, holds several elements, or requires no gradient.
    """
    if not isinstance(loss, Tensor):
        raise UserCodeError(
            f"The loss is {loss!r}."
            if loss is None
            else f"The loss is a {type(loss).__name__}, not a tensor.",
            "Return a scalar tensor that requires a gradient.",
        )
    if loss.numel() != 1:
        raise UserCodeError(
            f"The loss has shape {tuple(loss.shape)}.",
            "Return a scalar, such as its mean().",
        )
    if not loss.requires_grad:
        raise UserCodeError(
            "The loss does not require a gradient.",
            "Compute it from parameters that do, without detach(), item() or no_grad().",
        )
    return loss.reshape(())


def released(_: Any) -> Tensor:
    """Stands where the forward of a step was. Raises ``UserCodeError``."""
    raise UserCodeError(
        "A train step was called after its strategy was closed or had built another one.",
        "Build a new one with train_step(spec).",
    )


def same_version(library: str, version: str, collectives: Collectives) -> None:
    """Stop ranks that have different versions of a library, on all of them.

    Args:
        library: Its name, for the message.
        version: What this rank has, such as ``"0.19.8"``.
        collectives: All ranks call this together.

    Raises:
        ClusterError: They have.
    """
    numbers = [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:4]]
    mine = torch.tensor([*numbers, *[0] * (4 - len(numbers))], dtype=torch.int64)
    least = collectives.all_reduce(mine, ReduceOp.MIN)
    most = collectives.all_reduce(mine, ReduceOp.MAX)
    if not torch.equal(least, most):
        text = [".".join(str(int(n)) for n in found[:3]) for found in (least, most)]
        raise ClusterError(
            f"Ranks have different versions of {library}: {text[0]} and {text[1]}; this one has "
            f"{version}.",
            "Install the same version everywhere.",
        )
