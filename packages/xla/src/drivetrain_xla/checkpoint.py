"""Checkpoints of XLA devices: the common layout, written from the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch_xla
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Mapping


class XlaCheckpointIO(DirectoryCheckpointIO):
    """As ``DirectoryCheckpointIO``; tensors that are recorded only are computed first, all at once.

    What a strategy gathers is on the host already. Tensors of the user's own in a tree may not be,
    and each of them would be a graph of its own.
    """

    def save(self, tree: Mapping[str, Any], path: str) -> None:
        """Write ``tree`` to the directory ``path``; errors are those of the base class."""
        torch_xla.sync()
        super().save(tree, path)
