"""Stages of a pipeline: who has which layers, and giving them memory and taking it away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from drivetrain_interfaces import UnsupportedError
from drivetrain_interfaces.errors import listed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage

from drivetrain_toolkit.strategies.units import keep_activations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain_interfaces import StrategyContext
    from torch import Tensor


#: Before the first step of a schedule, torch sends uninitialized memory through stages that were
#: not traced, and back, to learn the formats of what they exchange.
REHEARSES = hasattr(PipelineStage, "_backward_metadata_inference")


class Layers(nn.Module):
    """Layers of one stage, on which torch's rehearsal leaves no trace.

    Args:
        layers: What the stage computes.
        first: The stage gets batches; all others get memory without values in the rehearsal.
    """

    def __init__(self, layers: nn.Module, *, first: bool) -> None:
        super().__init__()
        self.layers = layers
        self._first = first
        self._rehearsal = REHEARSES

    def forward(self, value: Tensor) -> Any:
        """Compute; the first time with values that are defined, and buffers that are dropped."""
        if not self._rehearsal:
            return self.layers(value)
        self._rehearsal = False
        if not self._first:
            with torch.no_grad():
                value.zero_()
        buffers = {name: buffer.clone() for name, buffer in self.layers.named_buffers()}
        return torch.func.functional_call(self.layers, buffers, (value,))


class Line:
    """The ranks of this rank's pipeline, and those that hold the same layers in others.

    Args:
        copies: How many pipelines there are.
        device: Of this rank.
    """

    def __init__(self, copies: int, device: torch.device) -> None:
        size = dist.get_world_size()
        self.stages = size // copies
        self.stage = dist.get_rank() % self.stages
        self.copies = copies
        if copies == 1:
            self.group = cast("dist.ProcessGroup", dist.group.WORLD)
            self._alike: dist.ProcessGroup | None = None
            return
        mesh = init_device_mesh(
            device.type, (copies, self.stages), mesh_dim_names=("copy", "stage")
        )
        self.group = mesh["stage"].get_group()
        self._alike = mesh["copy"].get_group()

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Give gradients the mean over copies, in place.

        Copies may lack other ones: what is sent is all, and which there are. A parameter that no
        copy has used keeps no gradient.
        """
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            by_kind.setdefault(parameter.dtype, []).append(parameter)
        for some in by_kind.values():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            present = grads[0].new_tensor([p.grad is not None for p in some])
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), present]).div_(self.copies)
            dist.all_reduce(flat, group=self._alike)
            *parts, present = torch.split(flat, [*(grad.numel() for grad in grads), len(some)])
            for number, (parameter, grad, part) in enumerate(zip(some, grads, parts, strict=True)):
                if parameter.grad is None and not present[number]:
                    continue
                parameter.grad = grad.copy_(part.view_as(grad))


def balanced(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """How many consecutive items each part gets, so that the largest part is small.

    Every part gets at least one item, while there are any.
    """
    counts, first = [], 0
    for part in range(parts):
        left = parts - part
        target = sum(sizes[first:]) / left
        last, held = first, 0.0
        while last < len(sizes) - (left - 1):
            if last > first and left > 1 and held + sizes[last] / 2 > target:
                break
            held += sizes[last]
            last += 1
        counts.append(last - first)
        first = last
    return tuple(counts)


def fill(
    module: nn.Module, owners: Mapping[str, int], context: StrategyContext, stage: int
) -> None:
    """Give memory to the layers of other stages, and the values of the first that has them."""
    collectives = context.collectives
    with torch.no_grad():
        for name, owner in _layers(owners).items():
            part = module.get_submodule(name)
            if owner != stage:
                _with_memory(part, full=True)
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                tensor.data.copy_(collectives.broadcast(tensor.detach(), owner))


def empty(module: nn.Module, owners: Mapping[str, int], stage: int) -> None:
    """Take the memory of other stages' layers away."""
    for name, owner in _layers(owners).items():
        if owner != stage:
            _with_memory(module.get_submodule(name), full=False)


def elsewhere(module: nn.Module, owners: Mapping[str, int], stage: int) -> frozenset[str]:
    """Names, in the module's ``state_dict``, of the tensors of other stages' layers."""
    layers = _layers(owners)
    return frozenset(
        name for name in module.state_dict() if layers.get(name.rpartition(".")[0], stage) != stage
    )


def make_whole(module: nn.Module, context: StrategyContext) -> bool:
    """Undo what ``prepare`` of an earlier run did; False if that had another number of ranks."""
    size, stages, owners, name = module.__dict__["_drivetrain_stages"]
    if size != context.world.size:
        return False
    del module.__dict__["_drivetrain_stages"]
    sequence = module.get_submodule(name)
    vars(sequence).pop("forward", None)
    keep_activations(sequence)
    fill(module, owners, context, context.world.rank % stages)
    return True


def _layers(owners: Mapping[str, int]) -> dict[str, int]:
    return {name.rpartition(".")[0]: owner for name, owner in owners.items()}


def _with_memory(part: nn.Module, *, full: bool) -> None:
    """New memory for a module's own tensors; optimizers go on holding the same parameters.

    Without, a tensor is one number in its shape.
    """
    for parameter in part.parameters(recurse=False):
        parameter.data = _blank(parameter, full=full)
    for name, buffer in list(part.named_buffers(recurse=False)):
        setattr(part, name, _blank(buffer, full=full))


def _blank(tensor: Tensor, *, full: bool) -> Tensor:
    if full:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.new_zeros(()).expand(tensor.shape)


def refuse_outside(module: nn.Module, owners: Mapping[str, int], name: str) -> None:
    """Stop if a parameter belongs to no stage. Raises ``UnsupportedError``."""
    outside = [n for n, _ in module.named_parameters(remove_duplicate=False) if n not in owners]
    if outside:
        raise UnsupportedError(
            f"The strategy {name!r} divides a sequence of layers, and {listed(outside)} "
            f"{'is' if len(outside) == 1 else 'are'} not in it.",
            "Make them layers of the sequence.",
        )


def refuse_ties(module: nn.Module, owners: Mapping[str, int], name: str) -> None:
    """Stop if a parameter belongs to several stages. Raises ``UnsupportedError``."""
    groups: dict[int, list[str]] = {}
    for parameter, value in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(parameter)
    for names in groups.values():
        if len({owners[each] for each in names}) > 1:
            raise UnsupportedError(
                f"The strategy {name!r} was asked to put {listed(names)} on several ranks, which "
                "are one parameter with several names.",
                "Choose stages so that all of them are in one, or untie them.",
            )
