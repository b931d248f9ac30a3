"""Numeric formats: what is stored, what is computed in, and how a small loss survives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class PrecisionPolicy:
    """What a precision means, for engines that apply it themselves.

    Dtypes are torch's names without the prefix: ``"float32"``, ``"bfloat16"``, …

    Attributes:
        parameters: The dtype in which parameters are stored.
        compute: The dtype in which matrix products are computed.
        reduce: The dtype in which gradients are reduced over ranks.
        loss_scaling: Whether gradients need a scaled loss to stay above zero.
    """

    parameters: str = "float32"
    compute: str = "float32"
    reduce: str = "float32"
    loss_scaling: bool = False


@runtime_checkable
class Precision(Protocol):
    """Primitives of one numeric format. The step owns their order (docs/contracts/precision.md)."""

    @property
    def name(self) -> str:
        """The name users ask for, such as ``"bf16-mixed"``."""
        ...

    @property
    def policy(self) -> PrecisionPolicy:
        """What this precision means, as data."""
        ...

    def convert(self, module: nn.Module) -> nn.Module:
        """The module with parameters stored as the policy says. Called once, before the move."""
        ...

    def forward(self) -> AbstractContextManager[Any]:
        """A new context for one forward pass. Restores what it changes, also on exceptions."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate from a scalar loss, scaled if the format needs it."""
        ...

    def step(
        self, optimizers: Sequence[torch.optim.Optimizer], prepare: Callable[[], None]
    ) -> bool:
        """Unscale the gradients, call ``prepare`` (hooks, clipping), then update.

        Returns:
            Whether the update was applied. False means that nothing moved.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state to save, such as the loss scale. JSON values and tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...
