"""The state of a module and its optimizers by parameter name, apart from how they were run."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from drivetrain_interfaces import CheckpointError, Shard, StoredTensor
from drivetrain_interfaces.errors import listed
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch.optim import Optimizer

    Whole = Callable[[Tensor], Tensor | Shard]
    Place = Callable[[Any, Tensor], Tensor]


def gather_module(
    module: nn.Module,
    *,
    whole: Whole | None = None,
    keep: bool = True,
    absent: Collection[str] = (),
) -> dict[str, Any]:
    """The module's ``state_dict`` as copies on the host, so that training may go on meanwhile.

    Args:
        module: The module.
        whole: From what a rank holds of a tensor to the whole of it, if ranks hold parts, or to a
            ``Shard``. Called on every rank for the same tensors in the same order.
        keep: False on a rank that only helps others to get theirs; it returns nothing.
        absent: Names that are left out.
    """
    made = {
        name: _copied(value, whole, keep=keep)
        for name, value in module.state_dict().items()
        if name not in absent
    }
    return made if keep else {}


def restore_module(
    module: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    place: Place | None = None,
    absent: Collection[str] = (),
) -> None:
    """Load what ``gather_module`` returned, from whatever device.

    Args:
        module: The module.
        state: What was gathered; a ``StoredTensor`` is read here.
        strict: Whether all names must be the same on both sides.
        place: From a whole tensor, which may be a ``StoredTensor``, and what is held here to what
            this rank holds of the former.
        absent: Names of what this rank does not hold: they must be there, and are not read.

    Raises:
        CheckpointError: Names are missing or unknown (only if ``strict``), or shapes differ.
    """
    mine = module.state_dict()
    differing = [
        f"{name} ({tuple(value.shape)} in the checkpoint, {tuple(mine[name].shape)} here)"
        for name, value in state.items()
        if _has_shape(value) and _has_shape(mine.get(name)) and value.shape != mine[name].shape
    ]
    if differing:
        raise CheckpointError(
            f"The checkpoint does not fit the module: shapes differ for {', '.join(differing)}.",
            "Build the module with the hyperparameters that it was saved with.",
        )
    given = {name: value for name, value in state.items() if name not in absent}
    for name, value in list(given.items()):
        if place is not None and _has_shape(value) and _has_shape(mine.get(name)):
            given[name] = place(_own(value), mine[name])
        elif isinstance(value, StoredTensor):
            given[name] = value.read()
    try:
        missing, unknown = module.load_state_dict(given, strict=False)
    except RuntimeError as error:  # a module that checks more than names and shapes
        raise CheckpointError(
            f"{type(module).__name__} refused the checkpoint's state.",
            "Build the module with the hyperparameters that it was saved with.",
        ) from error
    if strict:
        missing = [name for name in missing if name not in absent or name not in state]
        _refuse_names("module", missing, unknown)


def gather_optimizer(
    optimizer: Optimizer,
    module: nn.Module,
    *,
    whole: Whole | None = None,
    keep: bool = True,
    absent: Collection[str] = (),
) -> dict[str, Any]:
    """The optimizer's state as copies on the host, keyed by names of ``module``'s parameters.

    ``whole``, ``keep`` and ``absent`` are as for ``gather_module``.

    Returns:
        ``{"state": {parameter name: {key: value}}, "groups": [{"parameters": [names], …}]}``. A
        tied parameter has its first name; one without state, such as one that was never updated,
        has no entry.

    Raises:
        CheckpointError: The optimizer updates a parameter that the module does not have.
    """
    names = _names_by_group(optimizer, module)
    flat = [name for group in names for name in group]
    saved = optimizer.state_dict()
    named = {
        flat[key] if isinstance(key, int) else key: value for key, value in saved["state"].items()
    }
    return {
        "state": {
            name: _copied(value, whole, keep=keep)
            for name, value in named.items()
            if name not in absent
        },
        "groups": [
            {
                "parameters": group_names,
                **{key: _copied(value) for key, value in group.items() if key != "params"},
            }
            for group_names, group in zip(names, saved["param_groups"], strict=True)
        ],
    }


def restore_optimizer(
    optimizer: Optimizer,
    module: nn.Module,
    saved: Mapping[str, Any],
    *,
    strict: bool = True,
    place: Place | None = None,
) -> None:
    """Load what ``gather_optimizer`` returned, from whatever device.

    ``place`` is as for ``restore_module``, for what has the shape of its parameter.

    Raises:
        CheckpointError: Its groups hold other parameters than the optimizer's (only if ``strict``;
            if not, what has the same name is restored, and the rest keeps what it has).
    """
    names = _names_by_group(optimizer, module)
    aliases = _aliases(module)
    # A key that is no name is something that the optimizer keeps for itself.
    state = {aliases.get(name, name): value for name, value in saved["state"].items()}
    groups = [[aliases.get(n, n) for n in group["parameters"]] for group in saved["groups"]]
    if strict:
        _refuse_groups(type(optimizer).__name__, names, groups)
    index_of = {name: index for index, name in enumerate(n for group in names for n in group)}
    current = optimizer.state_dict()
    merged = dict(current["state"])
    changed = set()
    for name, value in state.items():
        if name in index_of or name in merged:
            merged[index_of.get(name, name)] = value
            changed.add(index_of.get(name, name))
    hyper = []
    for number, group in enumerate(current["param_groups"]):
        source = saved["groups"][number] if number < len(groups) else group
        values = {key: item for key, item in source.items() if key != "parameters"}
        hyper.append({**values, "params": group["params"]})
    # Torch keeps tensors that it need not convert, and training would then change the caller's.
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for key in changed:
        if place is not None and isinstance(key, int):
            merged[key] = _placed(merged[key], held[key], place)
        else:
            merged[key] = _copied(merged[key])
    optimizer.load_state_dict({"state": merged, "param_groups": _copied(hyper)})


def restore_optimizers(
    optimizers: Sequence[Optimizer],
    module: nn.Module,
    saved: Sequence[Mapping[str, Any]],
    *,
    strict: bool = True,
    place: Place | None = None,
) -> None:
    """Restore several, in order. Nothing happens if either side has none.

    ``place`` is as for ``restore_module``.

    Raises:
        CheckpointError: Their numbers differ, or one does not fit.
    """
    if not optimizers or not saved:
        return
    if len(optimizers) != len(saved):
        raise CheckpointError(
            f"The checkpoint holds {len(saved)} optimizers, and this run has {len(optimizers)}.",
            "Configure the same optimizers, or load the weights alone.",
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        restore_optimizer(optimizer, module, state, strict=strict, place=place)


def _names_by_group(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    result: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise CheckpointError(
                    f"Parameter {index} of group {number} of {type(optimizer).__name__}, of shape "
                    f"{tuple(parameter.shape)}, is no parameter of {type(module).__name__}, so its "
                    "state has no name.",
                    "Make what owns it an attribute of the module.",
                )
        result.append([names[id(parameter)] for parameter in group["params"]])
    return result


def _aliases(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter, and the first of those that a tied parameter has."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _refuse_groups(
    owner: str,
    mine: Sequence[Sequence[str]],
    saved: Sequence[Sequence[str]],
) -> None:
    here = {name for group in mine for name in group}
    there = {name for group in saved for name in group}
    _refuse_names(owner, sorted(here - there), sorted(there - here))
    if [set(group) for group in mine] != [set(group) for group in saved]:
        raise CheckpointError(
            f"{owner} has {len(mine)} parameter groups here and {len(saved)} in the checkpoint, or "
            "their parameters are divided in another way.",
            "Build the optimizer with the same groups in the same order.",
        )


def _refuse_names(owner: str, missing: Sequence[str], unknown: Sequence[str]) -> None:
    if missing or unknown:
        raise CheckpointError(
            f"The checkpoint does not fit {owner}: missing from the checkpoint: {listed(missing)}; "
            f"in the checkpoint only: {listed(unknown)}.",
            "Build the same module and optimizers that were saved, or load with strict=False.",
        )


def _has_shape(value: Any) -> bool:
    return isinstance(value, StoredTensor) or (isinstance(value, Tensor) and not is_lazy(value))


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _placed(value: Any, parameter: Tensor, place: Place) -> Any:
    if not isinstance(value, dict):
        return _copied(value)
    return {
        key: place(_own(item), parameter)
        if _has_shape(item) and tuple(item.shape) == tuple(parameter.shape)
        else _copied(item)
        for key, item in value.items()
    }


def _copied(value: Any, whole: Whole | None = None, *, keep: bool = True) -> Any:
    """A copy on the host that shares no memory with ``value``.

    Tensors stay tensors, also those of one number, and become contiguous so that they can be
    written as they are.
    """
    if isinstance(value, Tensor):
        held = value.detach() if whole is None else whole(value.detach())
        return _on_host(held) if keep else None
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: _copied(item, whole, keep=keep) for key, item in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)(_copied(item, whole, keep=keep) for item in value)
    return copy.deepcopy(value)


def _on_host(held: Tensor | Shard) -> Tensor | Shard:
    if isinstance(held, Shard):
        return Shard(cast("Tensor", _on_host(held.data)), held.start, held.shape)
    return held.to("cpu", copy=True, memory_format=torch.contiguous_format)
