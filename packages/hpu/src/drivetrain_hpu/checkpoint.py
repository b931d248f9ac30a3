"""Checkpoints of Gaudi devices: the common layout, written from the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

from drivetrain_hpu.bridge import core, is_lazy, is_loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import SaveGroup
    from drivetrain_toolkit.background import ThreadedSave


class HpuCheckpointIO(DirectoryCheckpointIO):
    """As ``DirectoryCheckpointIO``, which copies tensors to the host, each once.

    So tied weights stay tied, and files are read where there is no Gaudi software. The functions of
    torch that the bridge replaces in lazy mode are not used. What was only recorded in that mode is
    computed first, all at once.
    """

    def save(self, tree: Mapping[str, Any], path: str) -> None:
        """Write ``tree`` to the directory ``path``; errors are those of the base class."""
        _compute()
        super().save(tree, path)

    def begin_save(
        self,
        tree: Mapping[str, Any],
        path: str,
        *,
        staged: bool = False,
        group: SaveGroup | None = None,
    ) -> ThreadedSave:
        """Take a copy of ``tree`` on the host, and return while it is being written."""
        _compute()
        return super().begin_save(tree, path, staged=staged, group=group)

    def save_sharded(self, tree: Mapping[str, Any], path: str, group: SaveGroup) -> None:
        """Write this process's part; errors are those of the base class."""
        _compute()
        super().save_sharded(tree, path, group)


def _compute() -> None:
    if is_loaded() and is_lazy():
        core().mark_step()
