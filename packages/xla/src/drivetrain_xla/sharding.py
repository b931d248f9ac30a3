"""Which part of a tensor lies on which device: a mesh with named axes, and rules for parameters.

XLA divides the computation itself (GSPMD): results are those of one device with the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch_xla.distributed.spmd as xs
from drivetrain_interfaces import ConfigurationError
from drivetrain_interfaces.errors import listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

#: The batch is divided along these; along FSDP, parameters are divided as well.
DATA: Final = "data"
FSDP: Final = "fsdp"

#: For each dimension of a tensor, the axis along which it is divided, or None.
Partition = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh, and what is divided along its axes.

    Attributes:
        axes: Devices along each axis, in order.
        plan: For names of parameters (``*`` and ``?`` stand for anything), how each is divided:
            an axis or None for every dimension.
    """

    axes: Mapping[str, int]
    plan: Mapping[str, Partition] = field(default_factory=dict)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes along which a batch is divided."""
        return tuple(name for name in self.axes if name in {DATA, FSDP})

    @property
    def parts(self) -> int:
        """How many parts a batch is divided into."""
        return math.prod(self.axes[name] for name in self.batch_axes)

    def mesh(self) -> xs.Mesh:
        """Torch_xla's mesh over all devices."""
        shape = tuple(self.axes.values())
        return xs.Mesh(np.arange(math.prod(shape)), shape, tuple(self.axes))

    def of_batch(self, tensor: Tensor) -> Partition | None:
        """How a tensor of a batch is divided; None for one that every device gets whole."""
        if not tensor.dim() or not self.parts or tensor.shape[0] % self.parts:
            return None
        return (self.batch_axes, *(None,) * (tensor.dim() - 1))

    def of_parameters(self, module: nn.Module) -> dict[str, Partition]:
        """How each parameter is divided, by name.

        Raises:
            ConfigurationError: The plan names a parameter that is not there, or divides one in a
                way that it cannot be.
        """
        found: dict[str, Partition] = {}
        unused = set(self.plan)
        for name, parameter in module.named_parameters():
            rules = [pattern for pattern in self.plan if fnmatchcase(name, pattern)]
            unused -= set(rules)
            partition = self.plan[rules[0]] if rules else (None,) * parameter.dim()
            self._check(name, parameter, partition)
            found[name] = self._sharded(parameter, partition)
        if unused:
            raise ConfigurationError(
                f"The sharding plan names {listed(unused)}, which no parameter of "
                f"{type(module).__name__} is called.",
                "Use names of named_parameters(), with * for what may differ.",
            )
        return found

    def _check(self, name: str, parameter: Tensor, partition: Partition) -> None:
        shape = tuple(parameter.shape)
        sizes = [self.axes.get(axis, 0) if axis else 1 for axis in partition]
        if len(sizes) != len(shape) or not all(
            size and not length % size for size, length in zip(sizes, shape, strict=True)
        ):
            raise ConfigurationError(
                f"The sharding plan divides {name!r} of shape {shape} as {partition}, on a mesh "
                f"with {dict(self.axes)}.",
                "Give an axis of the mesh or None for each dimension, which it must divide.",
            )

    def _sharded(self, parameter: Tensor, partition: Partition) -> Partition:
        """The partition, with the largest dimension that is free divided along ``fsdp``."""
        size = self.axes.get(FSDP, 0)
        free = [
            (length, -dim)
            for dim, length in enumerate(parameter.shape)
            if size and partition[dim] is None and length >= size and not length % size
        ]
        if FSDP in partition or not free:
            return partition
        chosen = -max(free)[1]
        return (*partition[:chosen], FSDP, *partition[chosen + 1 :])


def make_layout(
    mesh: Mapping[str, int] | None,
    plan: Mapping[str, Sequence[Any]] | None,
    count: int,
    *,
    sharded: bool,
) -> Layout:
    """The layout for a number of devices.

    Args:
        mesh: Devices along each axis; one of them may be -1, for the rest. None puts all devices
            on one axis: ``fsdp`` if parameters are to be divided, else ``data``.
        plan: As in ``Layout``.
        count: How many devices there are.
        sharded: Whether parameters are to be divided.

    Raises:
        ConfigurationError: The axes do not make ``count`` devices, or have no usable names.
    """
    batch_axis = FSDP if sharded else DATA
    axes = dict(mesh or {batch_axis: -1})
    rest = [name for name, size in axes.items() if size == -1]
    known = math.prod(size for size in axes.values() if size != -1)
    if len(rest) == 1 and known > 0 and not count % known:
        axes[rest[0]] = count // known
    if math.prod(axes.values()) != count or min(axes.values()) < 1:
        raise ConfigurationError(
            f"mesh={dict(mesh or {})} was asked for, and there are {count} devices.",
            f"Give axes whose product is {count}; one may be -1.",
        )
    if sharded and FSDP not in axes:
        raise ConfigurationError(
            f"mesh={dict(mesh or {})} has no axis {FSDP!r}, along which parameters are to be "
            "divided.",
            f"Name one {FSDP!r}, or use strategy='spmd'.",
        )
    return Layout(axes, {name: tuple(parts) for name, parts in (plan or {}).items()})
