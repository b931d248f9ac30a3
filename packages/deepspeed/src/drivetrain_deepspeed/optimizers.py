"""The optimizer for state that waits in host memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


def cpu_adam(parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for the host, or torch's AdamW with one notice where it cannot be built.

    The first use compiles it, which takes a minute or more; do that once, in one process, before a
    job starts: ``python -c "import drivetrain_deepspeed as d; d.cpu_adam([...])"``.

    Args:
        parameters: Parameters or groups of them.
        options: Options that both have: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``amsgrad``.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, **options)
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            "DeepSpeedCPUAdam could not be built, and torch.optim.AdamW takes its place: "
            f"{reason[0] if reason else type(error).__name__}",
            stacklevel=2,
        )
        return torch.optim.AdamW(parameters, **options)
    return made
