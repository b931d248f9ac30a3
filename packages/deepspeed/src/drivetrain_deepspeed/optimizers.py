"""The optimizer for state that waits in host memory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

_WEIGHT_DECAY = 1e-2


def cpu_adam(parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for the host, or torch's AdamW with one notice where it cannot be built.

    The first use compiles it, which takes a minute or more; do that once, in one process, before a
    job starts: ``python -c "import drivetrain_deepspeed as d; d.build_cpu_adam()"``.

    Args:
        parameters: Parameters or groups of them.
        options: Options that both have: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``amsgrad``.
            What is left out is torch's default, whichever is made.
    """
    given = list(parameters)
    options.setdefault("weight_decay", _WEIGHT_DECAY)  # DeepSpeed's own default is another
    try:
        build_cpu_adam()
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        made: torch.optim.Optimizer = DeepSpeedCPUAdam(given, **options)
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            "DeepSpeedCPUAdam could not be built, and torch.optim.AdamW takes its place: "
            f"{reason[0] if reason else type(error).__name__}",
            stacklevel=2,
        )
        return torch.optim.AdamW(given, **options)
    return made


def build_cpu_adam() -> None:
    """Compile what DeepSpeed's Adam for the host needs, if that has not been done yet.

    A process that was killed while it compiled leaves a lock for which every later one would wait
    without end; one that nobody holds is removed first.

    Raises:
        RuntimeError: It cannot be compiled, as where there is no compiler.
        OSError: The same.
    """
    drop_stale_lock("cpu_adam")
    import deepspeed

    builder = deepspeed.accelerator.get_accelerator().get_op_builder("CPUAdamBuilder")
    builder().load(verbose=False)


def drop_stale_lock(operation: str) -> bool:
    """Remove the lock of a compilation that nobody does any more; whether there was one.

    Args:
        operation: Its name, which is that of the folder that it is compiled in.
    """
    from torch.utils import cpp_extension

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = cpp_extension._get_build_directory(operation, verbose=False)  # noqa: SLF001 - torch says it nowhere else
    lock = Path(folder, "lock")
    if not lock.exists() or _is_held(lock):
        return False
    lock.unlink(missing_ok=True)
    warnings.warn(
        f"A lock that a process left when it was ended while it compiled was removed: {lock}",
        stacklevel=2,
    )
    return True


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has it open, as the one that compiles does."""
    processes = Path("/proc")
    if not processes.is_dir():
        return True  # nobody can say
    wanted = os.stat(lock)
    for opened in processes.glob("[0-9]*/fd/*"):
        try:
            found = opened.stat()
        except OSError:  # it was closed, or belongs to another user
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
