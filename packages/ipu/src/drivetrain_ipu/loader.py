"""PopTorch's data loader, sized from what a run asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError, World
from torch.utils.data import IterableDataset

from drivetrain_ipu.options import Programs, inference_options, training_options
from drivetrain_ipu.sdk import load_sdk

if TYPE_CHECKING:
    from drivetrain_ipu.options import IpuOptions


def combined_loader(
    options: IpuOptions,
    dataset: Any,
    batch_size: int,
    replicas: int,
    world: World | None,
    *,
    training: bool,
    **arguments: Any,
) -> Any:
    """A ``poptorch.DataLoader`` of batches for all replicas and device iterations.

    The trainer accumulates such batches itself, so its loader is told of no accumulation.

    Args:
        options: Of the programs.
        dataset: A data set of torch.
        batch_size: Samples that one forward sees.
        replicas: Copies of the model in this process.
        world: The place of this process; None for one alone.
        training: Whether it is for training.
        arguments: Further ones of ``poptorch.DataLoader``.

    Raises:
        ConfigurationError: The data set is too small for one batch, or cannot be divided.
    """
    sdk = load_sdk()
    world = world or World()
    programs = Programs(options, replicas, world, options.random_seed or 0)
    parts = programs.training_parts if training else programs.inference_parts
    if isinstance(dataset, IterableDataset):
        if world.size > 1:
            raise ConfigurationError(
                f"{type(dataset).__name__} can only be iterated, and {world.size} processes would "
                "all train on the same samples.",
                "Give a data set with len() and indices, or let it deal by rank and pass it to a "
                "loader of torch.",
            )
    else:
        least = batch_size * parts * world.size
        if len(dataset) < least:
            raise ConfigurationError(
                f"{type(dataset).__name__} holds {len(dataset)} samples, and one batch takes "
                f"{least}: {batch_size} for each of {parts} parts in {world.size} processes.",
                "Give more data, a smaller batch_size, or fewer replicas.",
            )
    made = training_options(sdk, programs, 1) if training else inference_options(sdk, programs)
    arguments.setdefault("auto_distributed_partitioning", False)  # the trainer deals samples out
    return sdk.DataLoader(made, dataset, batch_size=batch_size, **arguments)
