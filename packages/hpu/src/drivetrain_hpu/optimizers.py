"""The vendor's fused optimizer and clipping, beside torch's own, which work as well."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import UnavailableError, UnsupportedError

from drivetrain_hpu.bridge import FAILURES, described, load_bridge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from drivetrain_interfaces import StepSpec

_HPEX = "habana_frameworks.torch.hpex"


def fused_adamw(
    params: Iterable[Any],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    moments_dtype: torch.dtype | tuple[torch.dtype, torch.dtype] | None = None,
) -> torch.optim.Optimizer:
    """The vendor's ``FusedAdamW`` with the defaults of ``torch.optim.AdamW``.

    Its own defaults are others (``eps=1e-6`` and no weight decay), so both are passed on. Numbers
    still differ a little from torch's: ``eps`` is added before the bias is corrected.

    Args:
        params: As for any optimizer of torch; on the device already.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Keeps the division defined.
        weight_decay: Decoupled weight decay.
        moments_dtype: The format of both moments, or of each; None is that of the parameters.

    Raises:
        UnavailableError: The Gaudi software does not import.
    """
    kind = _hpex("optimizers").FusedAdamW
    made: torch.optim.Optimizer = kind(
        params,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=True,
        moments_dtype=moments_dtype,
    )
    return made


def carry_step_count(optimizer: torch.optim.Optimizer) -> None:
    """After a state of torch's AdamW was loaded into ``FusedAdamW``: keep its count of steps.

    Torch counts for each parameter, the fused optimizer for each group. Without this it would
    correct the bias as if it had just begun.
    """
    if type(optimizer).__name__ != "FusedAdamW":
        return
    for group in optimizer.param_groups:
        counts = [
            int(optimizer.state[p]["step"])
            for p in group["params"]
            if "step" in optimizer.state.get(p, {})
        ]
        if counts and max(counts) > int(group.get("step", 0)):
            group["step"] = max(counts)


def fused_clip_norm(spec: StepSpec) -> Callable[..., Any]:
    """The class ``FusedClipNorm``, if it can do what the spec asks.

    Raises:
        UnsupportedError: Clipping is by value, or parameters have several formats.
        UnavailableError: The Gaudi software does not import.
    """
    assert spec.clip is not None, "asked only where there is clipping"
    formats = {
        p.dtype for item in spec.optimizers for group in item.param_groups for p in group["params"]
    }
    if spec.clip.by != "norm" or len(formats) > 1:
        found = (
            f"clipping is by {spec.clip.by!r}"
            if spec.clip.by != "norm"
            else f"parameters have {len(formats)} formats"
        )
        raise UnsupportedError(
            f"fused_clip=True was asked for, and {found}; the fused kernel clips to a total norm "
            "in one format.",
            "Leave fused_clip out.",
        )
    kind: Callable[..., Any] = _hpex("normalization").FusedClipNorm
    return kind


def _hpex(part: str) -> Any:
    load_bridge()
    try:
        return import_module(f"{_HPEX}.{part}")
    except FAILURES as error:
        raise UnavailableError(
            f"{_HPEX}.{part} was to be imported, and {described(error)}.",
            "Install the Gaudi software in one release, or use torch's optimizers and clipping.",
        ) from error
