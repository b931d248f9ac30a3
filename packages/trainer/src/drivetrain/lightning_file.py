"""Checkpoints of Lightning 2.x as trees of ours: weights, optimizers, schedulers, scale, counters.

What such a file holds, and when it was saved, is seen from its counters: a file that was saved at
the end of an epoch has processed one epoch more than it has completed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from drivetrain_interfaces import CheckpointError
from drivetrain_interfaces.checkpoint import Refused
from drivetrain_interfaces.errors import listed

from drivetrain.counters import Progress
from drivetrain.optim import configured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain.module import Module

MARK: Final = "pytorch-lightning_version"
_SCALERS: Final = ("MixedPrecision", "MixedPrecisionPlugin", "NativeMixedPrecisionPlugin")
_READ: Final = {
    MARK, "state_dict", "loops", "optimizer_states", "lr_schedulers", "epoch", "global_step",
    "hyper_parameters", "callbacks", "hparams_name", *_SCALERS,
}  # fmt: skip


def imported(
    held: Mapping[str, Any], module: Module | None, *, strict: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """A tree to resume from, and what could not be brought over, one line each.

    Args:
        held: What the file holds.
        module: The model that it is for, which says which parameters the optimizers' states belong
            to. Without it there are weights and hyperparameters only.
        strict: Whether names and shapes must be exactly the module's.

    Raises:
        CheckpointError: It is no file of Lightning 2.x, or does not fit the module.
    """
    _check(held)
    refused: list[str] = []
    hyper_parameters = _plain(held.get("hyper_parameters") or {}, "hyper_parameters", refused)
    weights = _plain(held["state_dict"], "state_dict", refused)
    tree: dict[str, Any] = {"module": weights, "hyper_parameters": hyper_parameters}
    if module is not None:
        tree["module"] = _fitting(weights, module, refused, strict=strict)
        tree |= _rest(held, module, refused)
    elif held.get("optimizer_states"):
        refused.append("optimizer_states, lr_schedulers, loops: they need the module")
    refused += [f"callbacks: {name}" for name in held.get("callbacks") or {}]
    refused += [f"{key}: saved by code of your own" for key in held if key not in _READ]
    return tree, refused


def _check(held: Mapping[str, Any]) -> None:
    version = held.get(MARK)
    if not isinstance(version, str) or not isinstance(held.get("state_dict"), dict):
        raise CheckpointError(
            f"A file of Lightning was expected, and this one holds {listed(held)}.",
            f"Give a file that has {MARK!r} and 'state_dict'.",
        )
    if not version.startswith("2."):
        raise CheckpointError(
            f"The file was saved by Lightning {version}, and files of 2.x are understood.",
            "Upgrade it with python -m lightning.pytorch.utilities.upgrade_checkpoint.",
        )


def _plain(value: Any, where: str, refused: list[str]) -> Any:
    """The value without what only its own code could make; that is listed."""
    if isinstance(value, Refused):
        if value.items is not None:
            return _plain(value.items, where, refused)
        refused.append(f"{where}: a {value.kind}, which only its own code could make")
        return None
    if isinstance(value, dict):
        found = {key: _plain(item, f"{where}.{key}", refused) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not None or value[key] is None}
    if type(value) is list or type(value) is tuple:
        return type(value)(_plain(item, f"{where}[{n}]", refused) for n, item in enumerate(value))
    return value


def _fitting(
    weights: Mapping[str, Any], module: Module, refused: list[str], *, strict: bool
) -> dict[str, Any]:
    mine = module.state_dict()
    missing, unknown = sorted(mine.keys() - weights.keys()), sorted(weights.keys() - mine.keys())
    differing = [
        f"{name} ({tuple(weights[name].shape)} in the file, {tuple(mine[name].shape)} here)"
        for name in sorted(mine.keys() & weights.keys())
        if isinstance(weights[name], torch.Tensor) and weights[name].shape != mine[name].shape
    ]
    if differing or (strict and (missing or unknown)):
        raise CheckpointError(
            f"The file does not fit {type(module).__name__}: missing from the file: "
            f"{listed(missing)}; in the file only: {listed(unknown)}; shapes differ: "
            f"{listed(differing)}.",
            "Build the module that was saved, or import with strict=False what has the same name.",
        )
    refused += [f"state_dict.{name}: {type(module).__name__} has no such name" for name in unknown]
    kept = {name: mine[name].detach().cpu() for name in missing}
    refused += [f"state_dict.{name}: not in the file, as the module has it" for name in missing]
    return {**{name: weights[name] for name in weights if name in mine}, **kept}


def _rest(held: Mapping[str, Any], module: Module, refused: list[str]) -> dict[str, Any]:
    optimizers, schedulers = configured(module.configure_optimizers(), type(module).__name__)
    scales = [held[key] for key in _SCALERS if isinstance(held.get(key), dict)]
    progress = _progress(held)
    if progress.batch:
        refused.append(
            f"the order of samples: the rest of epoch {progress.epoch}, from batch "
            f"{progress.batch} on, is of a new order"
        )
    states = _plain(held.get("lr_schedulers") or [], "lr_schedulers", refused)
    if len(states) != len(schedulers):
        raise CheckpointError(
            f"The file holds {len(states)} schedulers, and {type(module).__name__}"
            f".configure_optimizers returned {len(schedulers)}.",
            "Return the same optimizers and schedulers as when it was saved.",
        )
    refused.append("random numbers: Lightning saves none")
    return {
        "optimizers": _optimizers(held, module, optimizers, refused),
        "schedulers": states,
        "precision": dict(scales[0]) if scales else {},
        "loop": progress.state_dict(),
        "data": {"seed": None, "world": None, "samples": None},
        "ranks": {},
        "callbacks": {},
    }


def _optimizers(
    held: Mapping[str, Any],
    module: Module,
    optimizers: Sequence[torch.optim.Optimizer],
    refused: list[str],
) -> list[dict[str, Any]]:
    states = _plain(held.get("optimizer_states") or [], "optimizer_states", refused)
    if len(states) != len(optimizers):
        raise CheckpointError(
            f"The file holds {len(states)} optimizers, and {type(module).__name__}"
            f".configure_optimizers returned {len(optimizers)}.",
            "Return the same optimizers as when it was saved.",
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        _by_name(state, [[names[id(p)] for p in group["params"]] for group in one.param_groups])
        for state, one in zip(states, optimizers, strict=True)
    ]


def _by_name(state: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    theirs = state["param_groups"]
    sizes = [len(group["params"]) for group in theirs]
    if sizes != [len(group) for group in groups]:
        raise CheckpointError(
            f"The file's optimizer has groups of {sizes} parameters, and this one has groups of "
            f"{[len(group) for group in groups]}.",
            "Build the optimizer with the same groups in the same order.",
        )
    name_of = {
        number: name
        for group, own in zip(theirs, groups, strict=True)
        for number, name in zip(group["params"], own, strict=True)
    }
    return {
        "state": {name_of.get(key, key): value for key, value in state["state"].items()},
        "groups": [
            {
                "parameters": list(own),
                **{key: value for key, value in group.items() if key != "params"},
            }
            for group, own in zip(theirs, groups, strict=True)
        ],
    }


def _progress(held: Mapping[str, Any]) -> Progress:
    fit = (held.get("loops") or {}).get("fit_loop") or {}
    epochs = fit.get("epoch_progress", {}).get("current", {})
    batches = fit.get("epoch_loop.batch_progress", {}).get("current", {})
    done, closed = epochs.get("processed", held.get("epoch", 0)), epochs.get("completed", 0)
    inside = bool(batches.get("processed")) and done == closed
    batch = batches.get("processed", 0) if inside else 0
    # Saved after a validation, and not after a window: then the batch itself is completed.
    validated = inside and batches.get("completed") == batch
    return Progress(
        epoch=done,
        batch=batch,
        global_step=held.get("global_step", 0),
        validated_at=batch if validated else -1,
        epoch_open=inside,
    )
