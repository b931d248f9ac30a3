"""Modules of any form in stages, by torch's tracer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_interfaces.errors import listed
from torch.distributed.pipelining import SplitPoint, pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.distributed.pipelining import Pipe


def trace(net: nn.Module, example: Tensor, split: Sequence[str], owner: str) -> Pipe:
    """A module in stages, each of which begins with a module that ``split`` names, but the first.

    Stages hold the module's own parameters. What one stage made, any later one may use.

    Args:
        net: What is divided.
        example: What it is called with; stages take this shape only.
        split: Names of modules in it, in the order in which they are called.
        owner: Name of the strategy, for messages.

    Raises:
        ConfigurationError: A name is that of no module, or of one that is not called.
        UnsupportedError: Torch cannot trace the module.
    """
    unknown = [name for name in split if name not in dict(net.named_modules())]
    if unknown:
        raise ConfigurationError(
            f"split names {listed(unknown)}, and {type(net).__name__} has no such module.",
            "Give names of net.named_modules() with which a stage begins.",
        )
    parts = [vars(net.get_submodule(name)) for name in split]
    before = [dict(part) for part in parts]
    try:
        made = pipeline(net, (example,), split_spec=dict.fromkeys(split, SplitPoint.BEGINNING))
    except Exception as error:
        raise UnsupportedError(
            f"The strategy {owner!r} was asked to divide a {type(net).__name__}, which torch "
            f"cannot trace ({type(error).__name__}).",
            "Take code that depends on values out of its forward, or divide an nn.Sequential.",
        ) from error
    finally:  # torch marks modules by functions in the place of theirs, and leaves them there
        for part, kept in zip(parts, before, strict=True):
            for key in part.keys() - kept.keys():
                del part[key]
            part.update(kept)
    if made.num_stages != len(split) + 1:
        raise ConfigurationError(
            f"split={list(split)} makes {made.num_stages} stages of a {type(net).__name__}, since "
            "a stage begins where a named module is called first.",
            "Name modules that are called, each of them once and after the first one.",
        )
    return made


def owners_of(net: nn.Module, made: Pipe, stages: int, owner: str) -> dict[str, int]:
    """Which stage of the ranks' has each parameter, by all its names in the module.

    Args:
        net: What was divided.
        made: Its stages.
        stages: How many ranks there are for them; several stages go to each in turn.
        owner: Name of the strategy, for messages.

    Raises:
        UnsupportedError: Several ranks would need one parameter, or parameters of one module.
    """
    found: dict[int, set[int]] = {}
    for number in range(made.num_stages):
        for parameter in made.get_stage_module(number).parameters():
            found.setdefault(id(parameter), set()).add(number % stages)
    named = [(n, p) for n, p in net.named_parameters(remove_duplicate=False) if id(p) in found]
    for by_module in (False, True):
        groups: dict[str | int, set[int]] = {}
        ranks: dict[str | int, set[int]] = {}
        for name, parameter in named:
            key = name.rpartition(".")[0] if by_module else id(parameter)
            groups.setdefault(key, set()).add(id(parameter))
            ranks.setdefault(key, set()).update(found[id(parameter)])
        for key, members in groups.items():
            if len(ranks[key]) > 1:
                names = [name for name, parameter in named if id(parameter) in members]
                raise UnsupportedError(
                    f"The strategy {owner!r} was asked to put {listed(names)} on several ranks, "
                    "which are one parameter, or belong to one module.",
                    "Choose stages so that all of them are in one, or untie them.",
                )
    return {name: next(iter(found[id(parameter)])) for name, parameter in named}
