"""What strategies share whose ranks hold parts of a module: its state, whole and by parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_toolkit.shards import gather_parts, restore_parts, sharded_parts
from drivetrain_toolkit.strategies.eager import EagerStrategy

if TYPE_CHECKING:
    from collections.abc import Collection

    from drivetrain_interfaces import ModelState
    from torch import nn


class DividedStrategy(EagerStrategy):
    """Each rank holds parts of tensors, or some tensors of a module, while it is divided."""

    def state(self) -> ModelState:
        """The whole state on rank 0; the others help, and return an empty one."""
        return self._gathered(self._held()) if self._is_divided() else super().state()

    def sharded_state(self) -> ModelState:
        """What this rank holds, as copies on the host; no rank waits for another."""
        if not self._is_divided():
            return super().state()
        return sharded_parts(
            self._held(), self._optimizers, self.context.precision, absent=self._absent()
        )

    def load_sharded(self, state: ModelState, *, strict: bool = True) -> None:
        """As ``load``, of stored tensors, of which each rank reads its parts."""
        self.load(state, strict=strict)

    def load(self, state: ModelState, *, strict: bool = True) -> None:
        """Restore a state of any strategy and world, of which each rank keeps its parts.

        Raises:
            CheckpointError: Something does not fit; names what.
        """
        if not self._is_divided():
            super().load(state, strict=strict)
            return
        restore_parts(
            self._held(),
            self._optimizers,
            self.context.precision,
            state,
            strict=strict,
            absent=self._absent(),
        )

    def _is_divided(self) -> bool:
        """Whether there is a module that ``prepare`` has divided."""
        raise NotImplementedError

    def _held(self) -> nn.Module:
        """The module, with its parts in their places."""
        return self._prepared()

    def _absent(self) -> Collection[str]:
        """Names of the tensors of which this rank holds nothing."""
        return ()

    def _gathered(self, module: nn.Module) -> ModelState:
        return gather_parts(
            module, self._optimizers, self.context.precision, keep=self.context.world.is_main
        )
