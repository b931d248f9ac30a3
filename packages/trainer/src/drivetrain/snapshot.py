"""What a checkpoint of a fit contains: collecting it from all ranks, and restoring it.

The tree is the same for every strategy and world size: full tensors by parameter name, and what
belongs to one rank (random numbers, unfinished epoch metrics) under that rank's number.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from drivetrain_interfaces import (
    CheckpointError,
    ModelState,
    SupportsBackgroundSave,
    SupportsShardedLoad,
    SupportsShardedSave,
    UnsupportedError,
)
from drivetrain_interfaces.discovery import take_inventory
from drivetrain_interfaces.errors import listed

from drivetrain import pointers, sharing
from drivetrain.exchange import gather_objects
from drivetrain.seeding import rng_state, set_rng_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain_interfaces import CheckpointIO, PendingSave

    from drivetrain.loop import FitRun
    from drivetrain.runtime import Stack

log = logging.getLogger("drivetrain")

T = TypeVar("T")

_PARTS = ("module", "optimizers", "schedulers", "precision", "loop", "ranks", "data", "callbacks")


def collect(run: FitRun, *, weights_only: bool = False) -> dict[str, Any]:
    """The tree of a fit. Every rank calls it; rank 0's is the one to write.

    Where each rank writes its own part, parts of the model's state are ``Shard``s.
    """
    state = sharing.state_of(run.stack)
    tree: dict[str, Any] = {"module": dict(state.module), "hyper_parameters": run.module.hparams}
    if weights_only:
        return tree
    tree["optimizers"] = list(state.optimizers)
    tree["precision"] = dict(state.precision)
    tree["schedulers"] = [each.scheduler.state_dict() for each in run.schedulers]
    tree["loop"] = {**run.progress.state_dict(), "elapsed": run.elapsed}
    tree["data"] = {
        "seed": run.seed,
        "world": run.stack.world.size,
        "samples": run.samples_seen,
    }
    own = {
        "rng": rng_state(run.stack.accelerator, run.stack.strategy.device),
        "metrics": run.metrics.state_dict(),
        "loader": run.feed.state_dict(),
    }
    ranks = gather_objects(own, run.stack.collectives, run.stack.strategy.device)
    tree["ranks"] = {str(rank): theirs for rank, theirs in enumerate(ranks)}
    tree["callbacks"] = {
        each.state_key: kept for each in run.trainer.callbacks if (kept := each.state_dict())
    }
    if run.datamodule is not None:
        tree["datamodule"] = run.datamodule.state_dict()
    run.hooks.call("on_save_checkpoint", tree)
    return tree


def write_checkpoint(
    tree: Mapping[str, Any], path: str, stack: Stack, check: Callable[[], None] | None = None
) -> None:
    """Write on rank 0, or on every rank its part. An error on one is raised on all.

    ``check`` raises once a rank is known to have ended, so that none waits for it.
    """
    checkpoint_io = stack.checkpoint_io
    if sharing.writes_parts(stack) and isinstance(checkpoint_io, SupportsShardedSave):
        part, group = sharing.own_part(tree, stack), sharing.group_of(stack, check)
        sharing.on_all(lambda: checkpoint_io.save_sharded(part, path, group), path, stack)
    else:
        _on_rank_0(lambda: checkpoint_io.save(tree, path), path, stack)


def begin_checkpoint(
    tree: Mapping[str, Any], path: str, stack: Stack, check: Callable[[], None] | None = None
) -> PendingSave | None:
    """Begin to write; on rank 0 what is returned says how it ends; None on other ranks.

    Raises:
        UnsupportedError: The checkpoint IO does not save in the background.
        CheckpointError: Something cannot be encoded; also on the other ranks.
    """
    checkpoint_io = stack.checkpoint_io
    if not isinstance(checkpoint_io, SupportsBackgroundSave):
        raise UnsupportedError(
            f"{path!r} was to be saved in the background, and {type(checkpoint_io).__name__} saves "
            "only while training waits.",
            "Save without asynchronous, or use a checkpoint IO with begin_save.",
        )
    # The state of the strategy is a copy already (rule S29); the rest may belong to somebody.
    owned = {
        key: part if key in {"module", "optimizers"} else _copied(part)
        for key, part in tree.items()
    }
    if sharing.writes_parts(stack):
        mine, group = sharing.own_part(owned, stack), sharing.group_of(stack, check)
        pending = sharing.on_all(
            lambda: checkpoint_io.begin_save(mine, path, staged=True, group=group), path, stack
        )
        return pending if stack.world.is_main else None
    return _on_rank_0(lambda: checkpoint_io.begin_save(owned, path, staged=True), path, stack)


def _on_rank_0(act: Callable[[], T], path: str, stack: Stack) -> T | None:
    problem: Exception | None = None
    done: T | None = None
    if stack.world.is_main:
        try:
            done = act()
        except Exception as error:  # noqa: BLE001 - raised below, here and on all other ranks
            problem = error
    said = stack.collectives.broadcast_object(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    if said is not None:
        raise CheckpointError(f"Rank 0 could not save {path!r}: {said}", "See rank 0's error.")
    return done


def _copied(part: Any) -> Any:
    """The part with copies of its tensors, on the host."""
    if isinstance(part, torch.Tensor):
        return part.detach().to("cpu", copy=True)
    if type(part) is dict:
        return {key: _copied(item) for key, item in part.items()}
    if type(part) is list or type(part) is tuple:
        return type(part)(_copied(item) for item in part)
    return part


def default_io(path: str) -> CheckpointIO:
    """The checkpoint IO of the best available backend, to read or write ``path``.

    Raises:
        CheckpointError: No backend that can run here is installed.
    """
    specs = [
        entry.spec
        for entry in take_inventory().backends
        if entry.spec is not None and entry.probe is not None and entry.probe.devices
    ]
    if not specs:
        raise CheckpointError(
            f"{path!r} cannot be read, since no installed backend can run on this machine.",
            "Pass checkpoint_io, or install a backend such as drivetrain[cpu].",
        )
    return max(specs, key=lambda spec: spec.priority).load().checkpoint_io()


def read_checkpoint(path: str, checkpoint_io: CheckpointIO | None = None) -> dict[str, Any]:
    """Read a checkpoint outside a run, by default with the best available backend's IO.

    Raises:
        CheckpointError: It is missing, corrupt or foreign, or nothing is installed to read it.
    """
    if checkpoint_io is None:
        checkpoint_io = default_io(path)
    return pointers.load(checkpoint_io, path)


def open_checkpoint(path: str, stack: Stack) -> dict[str, Any]:
    """The tree of a checkpoint; where each rank reads its own part, the model's state is stored.

    Raises:
        CheckpointError: It is missing, corrupt or foreign.
    """
    checkpoint_io = stack.checkpoint_io
    if not sharing.reads_parts(stack) or not isinstance(checkpoint_io, SupportsShardedLoad):
        return pointers.load(checkpoint_io, path)
    tree = pointers.follow(checkpoint_io.open, path)
    return {
        key: part if key in sharing.DIVIDED else sharing.in_memory(part)
        for key, part in tree.items()
    }


def restore_module(run_module: Any, stack: Stack, tree: Mapping[str, Any], *, strict: bool) -> None:
    """Restore the weights alone."""
    if "module" not in tree:
        raise CheckpointError(
            f"The checkpoint holds {sorted(map(str, tree))} and no 'module' part.",
            f"Give a checkpoint that a {type(run_module).__name__} was saved to by drivetrain.",
        )
    sharing.load_into(stack, ModelState(tree["module"]), strict=strict)


def lacks(tree: Mapping[str, Any]) -> list[str]:
    """The parts that a fit cannot be resumed without, and that are not in a tree."""
    return [part for part in _PARTS if part not in tree]


def restore(run: FitRun, tree: Mapping[str, Any]) -> None:
    """Restore everything but the random numbers, which come last (``restore_rng``)."""
    missing = lacks(tree)
    if missing:
        raise CheckpointError(
            f"The checkpoint holds only {sorted(map(str, tree))}; {missing} are missing to resume "
            "a fit.",
            "Resume from a full checkpoint, or load the weights with Module.load_from_checkpoint.",
        )
    _check_schedulers(run, tree)
    _say_what_differs(run, tree)
    sharing.load_into(
        run.stack,
        ModelState(tree["module"], tree["optimizers"], tree["precision"]),
        strict=run.module.strict_loading,
    )
    run.progress.load_state_dict(tree["loop"])
    for scheduled, state in zip(run.schedulers, tree["schedulers"], strict=True):
        scheduled.scheduler.load_state_dict(state)
        if run.progress.global_step and (of := getattr(scheduled.scheduler, "optimizer", None)):
            # What is saved may owe the end of its epoch, where this scheduler steps. torch warns
            # unless the optimizer has stepped, and by this knows only of steps in this process.
            of._opt_called = True  # noqa: SLF001 - torch offers no other way
    if tree["data"]["seed"] is not None:
        run.seed = tree["data"]["seed"]
    _restore_position(run, tree)
    rank, size = run.stack.world.rank, run.stack.world.size
    own = tree["ranks"].get(str(rank))
    if own is not None:
        # What ranks that are no more have logged in this epoch goes on with those that are left.
        lost = [tree["ranks"][str(each)] for each in range(rank + size, len(tree["ranks"]), size)]
        run.metrics.load_state_dict(own["metrics"], *(each["metrics"] for each in lost))
        run.feed.load_state_dict(own["loader"])
    for each in run.trainer.callbacks:
        if each.state_key in tree["callbacks"]:
            each.load_state_dict(tree["callbacks"][each.state_key])
    if run.datamodule is not None and "datamodule" in tree:
        run.datamodule.load_state_dict(tree["datamodule"])
    run.hooks.call("on_load_checkpoint", dict(tree))


def restore_rng(run: FitRun, tree: Mapping[str, Any]) -> None:
    """Restore this rank's random numbers, if it existed when the checkpoint was saved."""
    own = tree["ranks"].get(str(run.stack.world.rank))
    if own is not None:
        set_rng_state(own["rng"], run.stack.accelerator, run.stack.strategy.device)


def _restore_position(run: FitRun, tree: Mapping[str, Any]) -> None:
    """Where in the epoch the data continues; counted in samples when the world has changed."""
    samples, size = tree["data"]["samples"], run.feed.round_size
    if samples is None:
        return  # a foreign checkpoint, which counts in batches
    if size:
        run.progress.batch, run.sample_offset = divmod(samples, size)
    elif run.progress.batch and tree["data"]["world"] != run.stack.world.size:
        raise CheckpointError(
            f"The checkpoint was saved inside an epoch on {tree['data']['world']} ranks, and the "
            f"train loader cannot continue there on {run.stack.world.size}.",
            "Use a DataLoader over a map-style data set, or the same number of processes.",
        )


def _say_what_differs(run: FitRun, tree: Mapping[str, Any]) -> None:
    """With ``strict_loading=False`` names may differ; which ones do is said once."""
    if run.module.strict_loading or not run.stack.world.is_main:
        return
    here, there = run.module.state_dict().keys(), tree["module"].keys()
    if here != there:
        log.warning(
            "strict_loading is False, so what has the same name is restored. Missing from the "
            "checkpoint: %s; in the checkpoint only: %s.",
            listed(here - there),
            listed(there - here),
        )


def _check_schedulers(run: FitRun, tree: Mapping[str, Any]) -> None:
    if len(tree["schedulers"]) != len(run.schedulers):
        raise CheckpointError(
            f"The checkpoint holds {len(tree['schedulers'])} schedulers, and "
            f"{type(run.module).__name__}.configure_optimizers returned {len(run.schedulers)}.",
            "Return the same optimizers and schedulers as when it was saved.",
        )
