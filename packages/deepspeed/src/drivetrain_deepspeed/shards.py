"""What is divided over ranks, and how it is made whole again and divided anew.

The engine keeps float32 values and the optimizer's state in flat tensors, of which each rank has a
part. These classes know which part of which parameter is where. What they move between ranks is
moved bit for bit.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ReduceOp
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from drivetrain_interfaces import Collectives
    from torch import nn
    from torch.optim import Optimizer

#: Of an optimizer's state, what counts updates and has no part for each element.
STEP = "step"


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, whose sum with zeros changes nothing, not even minus zero."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.uint8)  # noqa: PLR2004 - bytes


class Groups:
    """Stages 1 and 2: parameters are whole, and each rank updates a part of each group's elements.

    Args:
        optimizer: The engine's wrapper around the user's optimizer.
        collectives: How ranks communicate.
    """

    def __init__(self, optimizer: Any, collectives: Collectives) -> None:
        self._engine = optimizer
        self._collectives = collectives
        flat = hasattr(optimizer, "single_partition_of_fp32_groups")
        self._parameters = optimizer.bit16_groups if flat else optimizer.bf16_groups
        self._flats = (
            optimizer.single_partition_of_fp32_groups
            if flat
            else optimizer.fp32_groups_flat_partition
        )

    @property
    def inner(self) -> Optimizer:
        """The user's optimizer, which updates flat tensors."""
        inner: Optimizer = self._engine.optimizer
        return inner

    def groups(self, *, changing: bool) -> Iterator[tuple[Sequence[nn.Parameter], Tensor]]:
        """Parameters that are updated together, and the flat tensor of this rank's elements."""
        yield from zip(self._parameters, self._flats, strict=True)

    def whole(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> list[Tensor]:
        """Tensors like the parameters, from what each rank has; every rank calls it.

        Args:
            parameters: Those of one group.
            flat: The float32 values of the group on this rank, or something of that shape.
        """
        total = sum(p.numel() for p in parameters)
        buffer = torch.zeros(total, dtype=flat.dtype, device=parameters[0].device)
        start = 0
        for parameter in parameters:
            mine = self._places(parameter)
            if mine is not None:
                inside, at, count = mine
                buffer.narrow(0, start + inside, count).copy_(flat.narrow(0, at, count))
            start += parameter.numel()
        bits = self._collectives.all_reduce(as_bits(buffer), ReduceOp.SUM)
        full = torch.split(bits.view(flat.dtype), [p.numel() for p in parameters])
        return [part.reshape(p.shape) for part, p in zip(full, parameters, strict=True)]

    def divide(
        self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], flat: Tensor
    ) -> None:
        """Put this rank's part of whole tensors into ``flat``."""
        for parameter, value in zip(parameters, values, strict=True):
            mine = self._places(parameter)
            if mine is not None:
                inside, at, count = mine
                flat.narrow(0, at, count).copy_(value.reshape(-1).narrow(0, inside, count))

    def relink(self) -> None:
        """Let the engine look at the optimizer's state again, after it was replaced."""
        if hasattr(self._engine, "_hp_optimizer_states_linked"):
            self._engine._hp_optimizer_states_linked = False  # noqa: SLF001 - done lazily by it

    @staticmethod
    def _places(parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """Where this rank's part is inside the parameter and in the flat tensor, and its length."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        inside, at = mapping.lp_fragment_address, mapping.hp_fragment_address
        return inside.start, at.start, at.numel


class Partitions:
    """Stage 3: each rank has a part of every parameter.

    Args:
        optimizer: The engine's wrapper around the user's optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self._engine = optimizer

    @property
    def inner(self) -> Optimizer:
        """The user's optimizer, which updates flat tensors."""
        inner: Optimizer = self._engine.optimizer
        return inner

    def groups(self, *, changing: bool) -> Iterator[tuple[Sequence[nn.Parameter], Tensor]]:
        """Parameters that are updated together, and the flat tensor of this rank's elements.

        What waits in files is in memory, with the optimizer's state, until the next group is asked
        for, and is written only if it is told to be ``changing``.
        """
        engine = self._engine
        flats = engine.fp32_partitioned_groups_flat
        for number, group in enumerate(zip(engine.fp16_groups, flats, strict=True)):
            in_files = engine._swappable_optimizer_subgroup(number)  # noqa: SLF001 - as its own accessors do
            if in_files:
                engine._optimizer_states_and_gradient_swap_in(number)  # noqa: SLF001
            yield group
            if in_files and changing:
                engine._optimizer_states_and_gradient_swap_out(number)  # noqa: SLF001
            elif in_files:
                engine._release_swap_buffers(number)  # noqa: SLF001

    def whole(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> list[Tensor]:
        """Tensors like the parameters, from what each rank has; every rank calls it."""
        return [gathered(p, self._part(p, flat)) for p in parameters]

    def divide(
        self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], flat: Tensor
    ) -> None:
        """Put this rank's part of whole tensors into ``flat``."""
        for parameter, value in zip(parameters, values, strict=True):
            part = self._part(parameter, flat)
            part.copy_(part_of(parameter, value, part.numel()))

    def relink(self) -> None:
        """Nothing: the engine looks at the optimizer's state itself."""

    def _part(self, parameter: Any, flat: Tensor) -> Tensor:
        _, start, count = self._engine.grad_position[self._engine.get_param_id(parameter)]
        return flat.narrow(0, start, count)


def is_divided(parameter: Any) -> bool:
    """Whether ranks have parts of this parameter."""
    return hasattr(parameter, "ds_tensor")


def gathered(parameter: Any, part: Tensor) -> Tensor:
    """The whole of which every rank has a part of the same length; every rank calls it."""
    group = parameter.ds_process_group
    count = torch.distributed.get_world_size(group)
    # Parts may wait on the host; they meet on the device, where ranks are connected.
    part = part.detach().to(parameter.device).contiguous()
    parts = [torch.empty_like(part) for _ in range(count)]
    torch.distributed.all_gather(parts, part, group=group)
    return torch.cat(parts)[: parameter.ds_numel].reshape(parameter.ds_shape)


def whole_parameter(parameter: Any) -> Tensor:
    """The whole of a parameter, of which every rank has a part; every rank calls it."""
    with part_in_memory(parameter, changing=False) as part:
        return gathered(parameter, part)


def waits_in_a_file(parameter: Any) -> bool:
    """Whether this rank's part of a divided parameter is in a file, and not in memory as well."""
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    return parameter.ds_tensor.status is not PartitionedParamStatus.AVAILABLE


@contextmanager
def part_in_memory(parameter: Any, *, changing: bool) -> Iterator[Tensor]:
    """This rank's part of a parameter, read from its file if it waits in one.

    Args:
        parameter: A divided one.
        changing: Whether the file has to be written afterwards.
    """
    part: Tensor = parameter.ds_tensor
    if not waits_in_a_file(parameter):
        yield part
        return
    swapper = parameter.nvme_swapper
    swapper.swap_in([parameter], async_op=False)
    try:
        yield part
    finally:
        if changing:
            swapper.swap_out_and_release([parameter])
        else:
            swapper.remove_partition_and_release_buffers([parameter])


def part_of(parameter: Any, value: Tensor, length: int) -> Tensor:
    """This rank's part of a whole value: ``length`` elements, filled up with zeros at the end."""
    start = torch.distributed.get_rank(parameter.ds_process_group) * length
    flat = value.detach().reshape(-1)[start : start + length]
    if flat.numel() < length:
        flat = torch.cat([flat, flat.new_zeros(length - flat.numel())])
    return flat


def set_parameter(parameter: Any, value: Tensor) -> None:
    """Give a divided parameter a new value, which every rank has."""
    with part_in_memory(parameter, changing=True) as held:
        held.data.copy_(part_of(parameter, value, held.numel()))
    if parameter.numel() == parameter.ds_numel:  # a small one, which is kept whole as well
        parameter.data.copy_(value.reshape(parameter.shape))
