"""Dividing a module into the units whose parameters are gathered together, and putting it back."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from drivetrain_interfaces import ConfigurationError, UnsupportedError
from drivetrain_interfaces.errors import listed
from torch import nn
from torch.distributed._composable.contract import (  # noqa: PLC2701 - what marks a module as wrapped
    REGISTRY_KEY,
    STATE_KEY,
)
from torch.distributed._composable_state import (  # noqa: PLC2701
    _module_state_mapping,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from drivetrain_toolkit.precision import _CastInputs
from drivetrain_toolkit.shards import whole_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from drivetrain_interfaces import Collectives

    Wanted = Sequence[str | type[nn.Module]] | Callable[[nn.Module], bool]


class Root(nn.Module):
    """Around the user's module, so that whatever function uses it runs inside one forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(module, *args)``."""
        return function(self.module, *args)


def chosen(module: nn.Module, wanted: Wanted | None, setting: str) -> list[nn.Module]:
    """The modules inside ``module`` that are meant, innermost first.

    Args:
        module: The user's module, which is never meant itself.
        wanted: Names, classes, or a function of a module; None means the elements of each
            ``ModuleList`` that hold parameters, which are the blocks of most large models.
        setting: The user's setting, for messages.

    Raises:
        ConfigurationError: A name or a class means nothing.
    """
    inside = [(name, part) for name, part in module.named_modules() if part is not module]
    if wanted is None:
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        blocks = {
            id(each) for part in lists for each in part if any(True for _ in each.parameters())
        }
        found = [part for _, part in inside if id(part) in blocks]
    elif callable(wanted):
        found = [part for _, part in inside if wanted(part)]
    else:
        found = []
        for each in wanted:
            some = [
                part
                for name, part in inside
                if (name == each if isinstance(each, str) else isinstance(part, each))
            ]
            if not some:
                shown = repr(each) if isinstance(each, str) else each.__name__
                raise ConfigurationError(
                    f"{setting} names {shown}, and {type(module).__name__} holds no such module.",
                    "Give names as in module.named_modules(), or classes.",
                )
            found += some
    order = {id(part): number for number, (_, part) in enumerate(inside)}
    unique = {id(part): part for part in found}
    return sorted(unique.values(), key=lambda part: -order[id(part)])


def refuse_ties_across(module: nn.Module, units: Sequence[nn.Module], name: str) -> None:
    """Stop if a parameter with several names would belong to several units.

    Raises:
        UnsupportedError: It would; names them.
    """
    owner: dict[str, int] = {}
    inside = {id(part): prefix for prefix, part in module.named_modules()}
    for number, unit in enumerate(units):  # innermost first: the first that has it owns it
        for parameter, _ in unit.named_parameters(remove_duplicate=False):
            owner.setdefault(f"{inside[id(unit)]}.{parameter}", number)
    groups: dict[int, list[str]] = {}
    for parameter, value in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(parameter)
    for names in groups.values():
        if len({owner.get(each, -1) for each in names}) > 1:
            raise UnsupportedError(
                f"The strategy {name!r} was asked to gather {listed(names)} separately, which are "
                "one parameter with several names.",
                "Choose units so that all of them are in one, or in none.",
            )


def materialize(
    module: nn.Module, done: Collection[int], device: torch.device, *, initialize: bool
) -> None:
    """Give memory and values to what was made on the ``meta`` device.

    Args:
        module: A unit; what is in ``done`` is left alone.
        done: Modules that were materialized already, by ``id``.
        device: Where.
        initialize: Whether this rank's values count, so that they have to be drawn.

    Raises:
        ConfigurationError: A module cannot say what its values are.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if id(part) in done or not any(tensor.is_meta for tensor in own):
            continue
        part.to_empty(device=device, recurse=False)
        if not hasattr(part, "reset_parameters"):
            raise ConfigurationError(
                f"{type(part).__name__} was built on the meta device, and has no "
                "reset_parameters() that gives its tensors their first values.",
                "Add one, or build it on the host.",
            )
        if initialize:
            cast("Any", part).reset_parameters()
    for first, *others in names.values():
        for other in others:
            owner, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(owner), attribute, module.get_parameter(first))


def place(module: nn.Module, done: Collection[int], device: torch.device) -> None:
    """Bring a unit to the device; what is in ``done`` is left alone.

    Parameters become new ones, since not every device's tensors can take the place of others.
    """
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if id(part) in done:
            continue
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.device == device:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    parameter.detach().to(device), requires_grad=parameter.requires_grad
                )
            setattr(part, name, made[id(parameter)])
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def spread_from_main(module: nn.Module, done: Collection[int], collectives: Collectives) -> None:
    """Give every rank rank 0's parameters and buffers of a unit, in place."""
    sent: set[int] = set()
    with torch.no_grad():
        for part in module.modules():
            if id(part) in done:
                continue
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if id(tensor) not in sent:
                    sent.add(id(tensor))
                    tensor.copy_(collectives.broadcast(tensor.detach()))


def checkpoint_activations(parts: Sequence[nn.Module]) -> None:
    """Let each module drop what its forward made, and make it again in backward."""
    for part in parts:
        # On the object, so that hooks, names and the class stay what they are.
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def keep_activations(module: nn.Module) -> None:
    """Undo ``checkpoint_activations``."""
    for part in module.modules():
        mine = vars(part).get("forward")
        if isinstance(mine, partial) and mine.func is checkpoint:
            del part.forward


def unwrap(root: nn.Module) -> None:
    """Take away what ``fully_shard`` added. Parameters stay the parts that they are.

    Without its hooks a module that is used alone raises an error, where it would otherwise wait for
    the other ranks for ever. Torch has no function for it.
    """
    for part in list(root.modules()):
        if not isinstance(part, FSDPModule):
            continue
        part.reshard()
        state = part._get_fsdp_state()  # noqa: SLF001 - as the summary says
        state._pre_forward_hook_handle.remove()  # noqa: SLF001
        state._post_forward_hook_handle.remove()  # noqa: SLF001
        for key in [key for key in vars(part) if _is_mark(key)]:
            vars(part).pop(key)
        part.__class__ = type(part).__mro__[2]
        _module_state_mapping.pop(part, None)
    for part in root.modules():
        for table in (
            part._state_dict_hooks,  # noqa: SLF001
            part._state_dict_pre_hooks,  # noqa: SLF001
            part._load_state_dict_pre_hooks,  # noqa: SLF001
            part._load_state_dict_post_hooks,  # noqa: SLF001
        ):
            hooks = cast("dict[int, Any]", table)
            for number in [n for n, hook in hooks.items() if _of_fsdp(hook)]:
                del hooks[number]


def _of_fsdp(hook: Any) -> bool:
    return "._fully_shard" in getattr(getattr(hook, "hook", hook), "__module__", "")


def _is_mark(key: str) -> bool:
    return key in {REGISTRY_KEY, STATE_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"}


def make_whole(module: nn.Module) -> None:
    """Turn parameters and buffers that are parts into whole ones. Every rank calls it."""
    with torch.no_grad():
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(
                            whole_of(parameter.detach()), requires_grad=parameter.requires_grad
                        )
                    setattr(part, name, made[id(parameter)])


def without_casts(module: nn.Module, before: Collection[int]) -> None:
    """Remove the casting hooks that were added since ``before`` was taken."""
    for part in module.modules():
        for number, hook in list(part._forward_pre_hooks.items()):  # noqa: SLF001 - no other way to list them
            if isinstance(hook, _CastInputs) and id(hook) not in before:
                del part._forward_pre_hooks[number]  # noqa: SLF001
                part._forward_pre_hooks_with_kwargs.pop(number, None)  # noqa: SLF001


@contextmanager
def unsynced(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """Gradients of these modules stay on their rank inside."""
    for each in modules:
        each.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for each in modules:
            each.set_requires_gradient_sync(True, recurse=False)
