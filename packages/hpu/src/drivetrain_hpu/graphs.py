"""Modules whose forward and backward are replayed as HPU graphs. Lazy mode only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import ConfigurationError

from drivetrain_hpu.bridge import device_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

#: Graphs that a module may have, one for each shape that it is called with.
MOST_GRAPHS = 10


class Graphs:
    """Graphs of some modules of a network, until they are released.

    Args:
        network: The network.
        names: Modules of it, as in ``named_modules()``.
        accumulates: Whether gradients of several backwards are summed.

    Raises:
        ConfigurationError: The network has no module of a name.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], *, accumulates: bool) -> None:
        known = dict(network.named_modules())
        for name in names:
            if not name or name not in known:
                raise ConfigurationError(
                    f"graphs=[{name!r}] was asked for, and the network has "
                    f"{', '.join(repr(one) for one in known if one)}.",
                    "Name some of these.",
                )
        hpu = device_module()
        self._modules = [known[name] for name in names]
        for module in self._modules:
            cacher = hpu.ModuleCacher(max_graphs=MOST_GRAPHS)
            cacher(model=module, inplace=True, have_grad_accumulation=accumulates)

    def release(self) -> None:
        """Give the modules their own forwards back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules = []
