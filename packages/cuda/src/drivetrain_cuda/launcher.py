"""Forking, as long as that is safe: a process that has a CUDA context cannot be copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ClusterError
from drivetrain_toolkit.launchers import ForkLauncher

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_interfaces import LaunchPlan, LaunchRequest, World


class CudaForkLauncher(ForkLauncher):
    """The fork launcher, for a notebook in which nothing has used a GPU yet.

    A context belongs to the process that made it. Copies of it cannot use any device, and torch
    notices only when they try.
    """

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The ranks of this machine. Raises ``ClusterError`` if a context exists already."""
        refuse_with_context()
        return super().plan(request)

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Run ``main`` in every process. Raises ``ClusterError`` if a context exists already."""
        refuse_with_context()
        return super().launch(main, plan)


def refuse_with_context() -> None:
    """Raise ``ClusterError`` if this process has a CUDA context."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ClusterError(
            "The 'fork' launcher was asked for, and this process has used a GPU already, such as "
            "by x.cuda(); a CUDA context cannot be copied into other processes.",
            "Use launcher='notebook', which starts fresh processes, or devices=1; or restart the "
            "notebook and leave the GPU to the trainer.",
        )
