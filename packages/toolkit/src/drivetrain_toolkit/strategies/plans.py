"""Plans that divide single layers over ranks: reading them, applying them, taking them back."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from drivetrain_toolkit.shards import part_of, whole_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_interfaces import StepSpec
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from drivetrain_toolkit.steps import Update

    Plan = Mapping[str, ParallelStyle | str]

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel, "sequence": SequenceParallel}


def styles_of(plan: Plan, module: nn.Module, owner: str) -> dict[str, ParallelStyle]:
    """The style of each module that a plan names, outer ones first.

    Args:
        plan: Styles by name of module, with ``*`` between dots.
        module: The user's module.
        owner: Name of the strategy, for messages.

    Raises:
        ConfigurationError: The plan names no module, or a style that there is not.
    """
    found: dict[str, ParallelStyle] = {}
    names = [name for name, _ in module.named_modules()]
    for pattern, asked in plan.items():
        style = _STYLES[asked]() if isinstance(asked, str) and asked in _STYLES else asked
        if not isinstance(style, ParallelStyle):
            raise ConfigurationError(
                f"The plan of the strategy {owner!r} says {asked!r} for {pattern!r}; there "
                f"is {listed(_STYLES)}, and torch's objects.",
                "Use one of them.",
            )
        some = [name for name in names if _matches(name, pattern)]
        if not some:
            raise ConfigurationError(
                f"The plan of the strategy {owner!r} names {pattern!r}, and "
                f"{type(module).__name__} has no such module.",
                "Use names of module.named_modules(), with * between dots.",
            )
        found |= dict.fromkeys(some, style)
    return {name: found[name] for name in names if name in found}


def divide(
    module: nn.Module, styles: Mapping[str, ParallelStyle], mesh: DeviceMesh, owner: str
) -> Installed:
    """Divide a module in place; returns what was added to it.

    Raises:
        UnsupportedError: A style cannot divide what it is for.
    """
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    installed = Installed(module)
    for name, style in styles.items():
        part = module.get_submodule(name)
        _refuse_unequal(name, part, style, mesh.size(), owner)
        try:
            parallelize_module(part, mesh, style)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"The plan of the strategy {owner!r} divides {name!r}, a "
                f"{type(part).__name__}, by {type(style).__name__}, which torch cannot do.",
                "Name the linear layers and embeddings in it, or use another style.",
            ) from error
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])
    installed.find()
    return installed


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def refuse_ties(module: nn.Module, planned: Mapping[str, Any], owner: str) -> None:
    """Torch divides a parameter by the module that has it, and the other would keep the old one."""
    groups: dict[int, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    for names in groups.values():
        if len(names) > 1 and any(name.rpartition(".")[0] in planned for name in names):
            raise UnsupportedError(
                f"The strategy {owner!r} was asked to divide {listed(names)}, which are one "
                "parameter with several names.",
                "Untie them, or leave the modules out of the plan.",
            )


def _refuse_unequal(
    name: str, part: nn.Module, style: ParallelStyle, ranks: int, owner: str
) -> None:
    """Plain tensors do not say how long other ranks' parts are, so torch takes them as equal."""
    if not isinstance(style, ColwiseParallel) or not style.use_local_output:
        return
    width = getattr(part, "out_features", getattr(part, "embedding_dim", 0))
    if width % ranks and style.output_layouts[0].is_shard():
        raise UnsupportedError(
            f"The plan of the strategy {owner!r} divides the {width} outputs of {name!r} over "
            f"{ranks} ranks, which makes unequal parts.",
            "Choose a width that the ranks divide, or ColwiseParallel(use_local_output=False).",
        )


class Installed:
    """What torch added to a module: hooks, and tensors of which each rank has a part."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tables = [
            table
            for part in module.modules()
            for table in (
                part._forward_pre_hooks,  # noqa: SLF001 - torch has no way to list them
                part._forward_pre_hooks_with_kwargs,  # noqa: SLF001
                part._forward_hooks,  # noqa: SLF001
                part._forward_hooks_with_kwargs,  # noqa: SLF001
            )
        ]
        self._before: list[dict[int, Any]] = [dict(table) for table in self._tables]
        self._after: list[dict[int, Any]] = []
        self._parts: list[tuple[dict[str, Any], str, DTensor]] = []

    def find(self) -> None:
        """Note what was added since this object was made."""
        self._after = [dict(table) for table in self._tables]

    def gather(self) -> None:
        """The module as it was, with whole tensors. Every rank calls it."""
        self._set(self._before, self._after)
        with torch.no_grad():
            for table, name, tensor in self._divided():
                whole = whole_of(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
                self._parts.append((table, name, tensor))

    def scatter(self) -> None:
        """Undo ``gather``; what was written to whole tensors is lost."""
        while self._parts:
            table, name, tensor = self._parts.pop()
            table[name] = tensor
        self._set(self._after, self._before)

    def remove(self) -> None:
        """Take hooks away for good. Parameters stay the parts that they are, buffers are whole."""
        self._set(self._before, self._after)
        for part in self._module.modules():
            vars(part).pop("_distribute_module_applied", None)  # torch would refuse a second time
        for table, name, tensor in self._divided():
            if not isinstance(tensor, nn.Parameter):
                table[name] = part_of(tensor)

    def _set(self, wanted: Sequence[dict[int, Any]], now: Sequence[dict[int, Any]]) -> None:
        for table, new, old in zip(self._tables, wanted, now, strict=True):
            held: dict[int, Any] = table
            for key in old.keys() - new.keys():
                held.pop(key, None)
            held.update({key: new[key] for key in new if key not in old})

    def _divided(self) -> list[tuple[dict[str, Any], str, DTensor]]:
        found: list[tuple[dict[str, Any], str, DTensor]] = []
        for part in self._module.modules():
            for table in (part._parameters, part._buffers):  # noqa: SLF001 - one loop for both
                held: dict[str, Any] = table
                found += [(held, n, t) for n, t in held.items() if isinstance(t, DTensor)]
        return found


class SameDraws:
    """A loss function in which ranks draw the same random numbers, and that returns a plain tensor.

    Ranks have random states of their own, and layers that are whole must do the same on all. So
    the first rank draws a seed for each microbatch; its state, and so the seeds, are in
    checkpoints.

    Args:
        loss: Called with a microbatch.
        device: Where it works.
        group: The ranks that share layers; None means all.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        device: torch.device,
        group: ProcessGroup | None = None,
    ) -> None:
        self._loss = loss
        self._device = device
        self._group = group
        self._devices = [] if device.type == "cpu" else [device]

    def __call__(self, microbatch: Any) -> Tensor:
        """The loss of a microbatch."""
        seed = torch.zeros((), dtype=torch.int64)
        if dist.get_rank(self._group) == 0:
            seed = torch.randint(2**62, ())
        seed = seed.to(self._device)
        dist.broadcast(seed, group=self._group, group_src=0)
        kind = self._device.type if self._devices else "cuda"  # unused without devices
        with torch.random.fork_rng(self._devices, device_type=kind):
            torch.manual_seed(int(seed))
            return whole_of(self._loss(microbatch))


class Settled:
    """An update for which gradients are divided as their parameters are.

    Args:
        update: The update.
        spec: What is trained.
        owner: Name of the strategy, for messages.
    """

    def __init__(self, update: Update, spec: StepSpec, owner: str) -> None:
        self._update = update
        self._mixed: list[tuple[Optimizer, int]] = []
        for optimizer in spec.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                if len({_divided_over(p) for p in group["params"]}) > 1:
                    _refuse_together(optimizer, group, owner)
                    if "foreach" in group:
                        self._mixed.append((optimizer, number))

    def __call__(self, optimizers: Sequence[Optimizer], prepare: Callable[[], None]) -> bool:
        """Update; whether the update was applied."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    grad = parameter.grad
                    if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                        parameter.grad = grad.redistribute(placements=parameter.placements)
        # Torch updates many parameters in one call by default, but not whole and divided ones.
        mixed = [optimizer.param_groups[number] for optimizer, number in self._mixed]
        before = [group["foreach"] for group in mixed]
        for group in mixed:
            group["foreach"] = False
        try:
            return self._update(optimizers, prepare)
        finally:
            for group, value in zip(mixed, before, strict=True):
                group["foreach"] = value


def _divided_over(parameter: Tensor) -> Any:
    """What tells parameters apart that torch does not update in one call."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def _refuse_together(optimizer: Optimizer, group: Mapping[str, Any], owner: str) -> None:
    for option in ("foreach", "fused"):
        if group.get(option):
            raise UnsupportedError(
                f"{type(optimizer).__name__} was asked for {option}=True over parameters of which "
                f"the strategy {owner!r} divides some, which torch does not update together.",
                "Leave it out, or give what is divided an optimizer of its own.",
            )
