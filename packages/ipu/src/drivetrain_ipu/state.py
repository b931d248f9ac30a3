"""The state of a module and its optimizer by parameter name, as plain tensors on the host."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import CheckpointError
from drivetrain_interfaces.errors import listed
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer


def copied(value: Any) -> Any:
    """A copy that shares no memory, of torch's own class: PopTorch's tensors need PopTorch."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format).as_subclass(Tensor)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return copy.deepcopy(value)


def gather_module(module: nn.Module) -> dict[str, Any]:
    """The module's ``state_dict`` as copies."""
    return {name: copied(value) for name, value in module.state_dict().items()}


def restore_module(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load what ``gather_module`` returned.

    Raises:
        CheckpointError: Names are missing or unknown (only if ``strict``), or shapes differ.
    """
    mine = module.state_dict()
    differing = [
        f"{name} ({tuple(value.shape)} in the checkpoint, {tuple(mine[name].shape)} here)"
        for name, value in state.items()
        if isinstance(value, Tensor)
        and isinstance(mine.get(name), Tensor)
        and value.shape != mine[name].shape
    ]
    if differing:
        raise CheckpointError(
            f"The checkpoint does not fit the module: shapes differ for {', '.join(differing)}.",
            "Build the module with the hyperparameters that it was saved with.",
        )
    missing, unknown = module.load_state_dict(dict(state), strict=False)
    if strict and (missing or unknown):
        raise CheckpointError(
            f"The checkpoint does not fit the module: it lacks {listed(missing)} and has besides "
            f"{listed(unknown)}.",
            "Build the same module, or load with strict=False.",
        )


def gather_optimizer(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The optimizer's state, keyed by names of ``module``'s parameters.

    Raises:
        CheckpointError: It updates a parameter that the module does not have.
    """
    names = _names(optimizer, module)
    flat = {id(p): n for g, ns in zip(optimizer.param_groups, names, strict=True)
            for p, n in zip(g["params"], ns, strict=True)}  # fmt: skip
    return {
        "state": {flat[id(p)]: copied(entries) for p, entries in optimizer.state.items()},
        "groups": [
            {"parameters": mine, **{k: copied(v) for k, v in group.items() if k != "params"}}
            for mine, group in zip(names, optimizer.param_groups, strict=True)
        ],
    }


def restore_optimizer(
    optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any], *, strict: bool
) -> None:
    """Load what ``gather_optimizer`` returned.

    Raises:
        CheckpointError: Its groups hold other parameters (only if ``strict``).
    """
    names = _names(optimizer, module)
    theirs = [list(group["parameters"]) for group in saved["groups"]]
    if strict and names != theirs:
        found = {n for group in theirs for n in group}
        mine = {n for group in names for n in group}
        raise CheckpointError(
            f"The checkpoint's optimizer does not fit: it lacks {listed(mine - found)} and has "
            f"besides {listed(found - mine)}, or their groups differ.",
            "Configure the optimizer as it was, or load the weights alone.",
        )
    for group, mine_names, source in zip(
        optimizer.param_groups, names, saved["groups"], strict=False
    ):
        group.update({k: copied(v) for k, v in source.items() if k != "parameters"})
        for parameter, name in zip(group["params"], mine_names, strict=True):
            if name in saved["state"]:
                optimizer.state[parameter] = copied(dict(saved["state"][name]))


def restore_optimizers(
    optimizers: Sequence[Optimizer],
    module: nn.Module,
    saved: Sequence[Mapping[str, Any]],
    *,
    strict: bool,
) -> None:
    """Restore the one there is. Nothing happens if either side has none.

    Raises:
        CheckpointError: The checkpoint holds several, or it does not fit.
    """
    if not optimizers or not saved:
        return
    if len(optimizers) != len(saved):
        raise CheckpointError(
            f"The checkpoint holds {len(saved)} optimizers, and this run has {len(optimizers)}.",
            "Configure the same optimizers, or load the weights alone.",
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        restore_optimizer(optimizer, module, state, strict=strict)


def _names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise CheckpointError(
                    f"Parameter {index} of group {number} of {type(optimizer).__name__}, of shape "
                    f"{tuple(parameter.shape)}, is no parameter of {type(module).__name__}, so its "
                    "state has no name.",
                    "Make what owns it an attribute of the module.",
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
