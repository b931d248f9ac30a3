"""Dividing a model over IPUs: modules, by name, at which another IPU takes over."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def ipus_per_replica(pipeline: Mapping[str, int]) -> int:
    """IPUs that one copy of the model takes."""
    return 1 + max(pipeline.values(), default=0)


def check_pipeline(network: nn.Module, pipeline: Mapping[str, int], accumulate: int) -> None:
    """Refuse names that are no modules, and a pipeline that training cannot fill.

    Args:
        network: The user's module.
        pipeline: From names of its modules to IPUs, in the order in which they are called.
        accumulate: Microbatches of a window.

    Raises:
        ConfigurationError: A module is unknown, or a number is no IPU.
        UnsupportedError: The pipeline is deeper than ``accumulate`` allows.
    """
    known = dict(network.named_modules())
    for name, ipu in pipeline.items():
        if name not in known or not name:
            near = difflib.get_close_matches(name, known, n=3)
            raise ConfigurationError(
                f"pipeline={dict(pipeline)!r} names {name!r}, which is no module of "
                f"{type(network).__name__}.",
                f"Use names such as {near or [one for one in known if one][:3]}.",
            )
        if isinstance(ipu, bool) or not isinstance(ipu, int) or ipu < 0:
            raise ConfigurationError(
                f"pipeline={dict(pipeline)!r} puts {name!r} on {ipu!r}, which is no IPU.",
                "Count IPUs from 0.",
            )
    stages = len(pipeline)
    if stages > 1 and accumulate < 2 * stages - 1:
        raise UnsupportedError(
            f"A pipeline of {stages} stages was asked for with accumulate_grad_batches="
            f"{accumulate}; while one microbatch goes through it and back, {2 * stages - 1} are on "
            "their way.",
            f"Accumulate {2 * stages - 1} batches or more, or use fewer stages.",
        )


def begin_blocks(network: nn.Module, pipeline: Mapping[str, int], sdk: Any) -> None:
    """Let a block begin at each named module. ``sdk.removeBlocks`` takes them away."""
    for name, ipu in pipeline.items():
        sdk.BeginBlock(network.get_submodule(name), name, ipu_id=ipu)


def execution(sdk: Any, pipeline: Mapping[str, int]) -> tuple[Any, Any]:
    """Execution strategies for training and for evaluation, each block a stage; Nones without.

    Evaluation runs one stage after the other, since a pipeline would want several batches a call.
    """
    if not pipeline:
        return None, None
    stage = sdk.AutoStage.AutoIncrement
    return sdk.PipelinedExecution(stage), sdk.ShardedExecution(stage)
