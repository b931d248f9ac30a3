"""The state of a module and its optimizer by parameter name, while an engine has them divided."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import CheckpointError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.state import gather_module, restore_module
from torch import Tensor, nn

from drivetrain_deepspeed.shards import (
    STEP,
    Groups,
    Partitions,
    is_divided,
    set_parameter,
    whole_parameter,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.optim import Optimizer


def names_by_group(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Names of an optimizer's parameters, read before the engine replaces them.

    Raises:
        CheckpointError: One of them is none of the module's.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise CheckpointError(
                    f"Parameter {index} of group {number} of {type(optimizer).__name__} is no "
                    f"parameter of {type(module).__name__}, so its state has no name.",
                    "Make what owns it an attribute of the module.",
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def module_state(
    module: nn.Module, shards: Groups | Partitions | None, *, half: bool, trained_only: bool
) -> dict[str, Any]:
    """The whole ``state_dict`` of the user's module on the host; every rank calls it.

    Args:
        module: The user's module.
        shards: The engine's parts, or None if nothing is divided.
        half: Whether parameters are in half precision, so that the float32 values are to be saved.
        trained_only: Leave out parameters that are not trained.
    """
    state = gather_module(module)
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        if is_divided(parameter):
            state[name] = _on_host(whole_parameter(parameter))
    if shards is not None and half:
        first = {id(p): p for p in named.values()}
        values: dict[int, Tensor] = {}
        for parameters, flat in shards.groups(changing=False):
            for parameter, value in zip(parameters, shards.whole(parameters, flat), strict=True):
                values[id(parameter)] = _on_host(value)
        assert values.keys() <= first.keys(), "the engine updates the module's parameters"
        state.update({n: values[id(p)].clone() for n, p in named.items() if id(p) in values})
    if trained_only:
        for name, parameter in named.items():
            if not parameter.requires_grad:
                state.pop(name, None)
    return state


def restore_module_state(
    module: nn.Module,
    shards: Groups | Partitions | None,
    saved: Mapping[str, Any],
    *,
    strict: bool,
    trained_only: bool,
) -> None:
    """Load what ``module_state`` or any other strategy returned.

    Raises:
        CheckpointError: Names are missing or unknown (only if ``strict``), or shapes differ.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    if trained_only:
        frozen = {name: p for name, p in named.items() if not p.requires_grad}
        saved = {**{n: _value_of(p) for n, p in frozen.items() if n not in saved}, **saved}
    divided = {name: p for name, p in named.items() if is_divided(p)}
    if divided:
        _restore_divided(module, divided, saved, strict=strict)
    else:
        restore_module(module, saved, strict=strict)
    if shards is None:
        return
    names: dict[int, str] = {}
    for name, parameter in named.items():
        if name in saved:
            names.setdefault(id(parameter), name)
    for parameters, flat in shards.groups(changing=True):
        whole = [
            saved[names[id(p)]].to(flat.device, flat.dtype) if id(p) in names else None
            for p in parameters
        ]
        for parameter, value in zip(parameters, whole, strict=True):
            if value is not None:
                with torch.no_grad():
                    shards.divide([parameter], [value], flat)


def _restore_divided(
    module: nn.Module, divided: Mapping[str, Any], saved: Mapping[str, Any], *, strict: bool
) -> None:
    mine = module.state_dict()
    shapes = {n: tuple(v.shape) for n, v in mine.items() if isinstance(v, Tensor)}
    shapes.update({name: tuple(p.ds_shape) for name, p in divided.items() if name in mine})
    differing = [
        f"{name} ({tuple(value.shape)} in the checkpoint, {shapes[name]} here)"
        for name, value in saved.items()
        if isinstance(value, Tensor) and name in shapes and tuple(value.shape) != shapes[name]
    ]
    if differing:
        raise CheckpointError(
            f"The checkpoint does not fit the module: shapes differ for {', '.join(differing)}.",
            "Build the module with the hyperparameters that it was saved with.",
        )
    missing, unknown = sorted(mine.keys() - saved.keys()), sorted(saved.keys() - mine.keys())
    if strict and (missing or unknown):
        raise CheckpointError(
            f"The checkpoint does not fit module: missing from the checkpoint: {listed(missing)}; "
            f"in the checkpoint only: {listed(unknown)}.",
            "Build the same module and optimizers that were saved, or load with strict=False.",
        )
    module.load_state_dict({n: v for n, v in saved.items() if n not in divided}, strict=False)
    with torch.no_grad():
        for name, parameter in divided.items():
            if name in saved:
                value = saved[name].to(
                    parameter.device, parameter.dtype
                )  # a part in a file has none
                set_parameter(parameter, value)


def optimizer_state(
    shards: Groups | Partitions, module: nn.Module, names: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The optimizer's state as copies on the host, keyed by name; every rank calls it.

    Args:
        shards: The engine's parts.
        module: The user's module.
        names: What ``names_by_group`` returned.
    """
    first = {id(p): name for name, p in module.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for parameters, flat in shards.groups(changing=False):
        values = shards.inner.state.get(flat, {})
        mine = [first[id(p)] for p in parameters]
        for key in sorted(values):
            value = values[key]
            if isinstance(value, Tensor) and value.shape == flat.shape and key != STEP:
                whole = [_on_host(one) for one in shards.whole(parameters, value)]
            else:
                whole = [_copy(value) for _ in parameters]
            for name, one in zip(mine, whole, strict=True):
                state.setdefault(name, {})[key] = one
    groups = []
    for group_names, group in zip(names, shards.inner.param_groups, strict=True):
        values = {key: _copy(value) for key, value in group.items() if key != "params"}
        groups.append({"parameters": list(group_names), **values})
    return {"state": state, "groups": groups}


def restore_optimizer_state(
    shards: Groups | Partitions,
    module: nn.Module,
    names: Sequence[Sequence[str]],
    saved: Mapping[str, Any],
    *,
    strict: bool,
) -> None:
    """Load what ``optimizer_state`` or any other strategy returned.

    Raises:
        CheckpointError: Its groups hold other parameters (only if ``strict``), or a shape differs.
    """
    if strict:
        _check_groups(names, [group["parameters"] for group in saved["groups"]])
    first = {id(p): name for name, p in module.named_parameters()}
    for parameters, flat in shards.groups(changing=True):
        entries = [saved["state"].get(first[id(p)], {}) for p in parameters]
        keys = {key for entry in entries for key in entry}
        if not keys:
            continue
        target = shards.inner.state[flat]
        for key in sorted(keys):
            _restore_key(shards, parameters, flat, key, entries, target)
    for group, source in zip(shards.inner.param_groups, saved["groups"], strict=False):
        group.update({k: _copy(v) for k, v in source.items() if k not in {"parameters", "params"}})
    shards.relink()


def _restore_key(
    shards: Groups | Partitions,
    parameters: Sequence[Any],
    flat: Tensor,
    key: str,
    entries: Sequence[Mapping[str, Any]],
    target: dict[str, Any],
) -> None:
    shapes = [tuple(p.ds_shape) if is_divided(p) else tuple(p.shape) for p in parameters]
    whole = [entry.get(key) for entry in entries]
    if (
        key != STEP
        and all(
            value is None or (isinstance(value, Tensor) and tuple(value.shape) == shape)
            for value, shape in zip(whole, shapes, strict=True)
        )
        and any(value is not None for value in whole)
    ):
        held = target.get(key)
        if not isinstance(held, Tensor) or held.shape != flat.shape:
            held = target[key] = torch.zeros_like(flat, requires_grad=False)
        for parameter, one, shape in zip(parameters, whole, shapes, strict=True):
            made = torch.zeros(shape) if one is None else one
            shards.divide([parameter], [made.to(held.device, held.dtype)], held)
        return
    found = [value for value in whole if value is not None]
    if any(isinstance(v, Tensor) and v.numel() != 1 for v in found):
        raise CheckpointError(
            f"The optimizer's {key!r} in the checkpoint has other shapes than its parameters.",
            "Build the module with the hyperparameters that it was saved with.",
        )
    value: Any = next(iter(found), None)
    if key == STEP:
        value = max(found, key=float)
    if key == STEP and len({float(one) for one in found}) > 1:
        warnings.warn(
            f"Parameters of one group were updated {min(map(float, found)):g} to "
            f"{float(value):g} times; the engine counts once for all and goes on from the most.",
            stacklevel=2,
        )
    held = target.get(key)
    if isinstance(held, Tensor) and isinstance(value, Tensor):
        held.copy_(value)
    else:
        target[key] = _copy(value)


def _check_groups(mine: Sequence[Sequence[str]], saved: Sequence[Sequence[str]]) -> None:
    here = {name for group in mine for name in group}
    there = {name for group in saved for name in group}
    if here != there:
        raise CheckpointError(
            f"The checkpoint does not fit the optimizer: missing from the checkpoint: "
            f"{listed(sorted(here - there))}; in the checkpoint only: "
            f"{listed(sorted(there - here))}.",
            "Build the same module and optimizers that were saved, or load with strict=False.",
        )
    if [set(group) for group in mine] != [set(group) for group in saved]:
        raise CheckpointError(
            f"The optimizer has {len(mine)} parameter groups here and {len(saved)} in the "
            "checkpoint, or their parameters are divided in another way.",
            "Build the optimizer with the same groups in the same order.",
        )


def _value_of(parameter: Any) -> Tensor:
    return _on_host(whole_parameter(parameter) if is_divided(parameter) else parameter)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _copy(value: Any) -> Any:
    return _on_host(value) if isinstance(value, Tensor) else value
