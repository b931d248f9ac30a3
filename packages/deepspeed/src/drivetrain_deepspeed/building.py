"""Models that no rank could hold: each layer is divided over the ranks as soon as it has values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import ConfigurationError
from drivetrain_toolkit.strategies.eager import broadcast_module
from drivetrain_toolkit.strategies.units import materialize, spread_from_main

from drivetrain_deepspeed.config import AUTO
from drivetrain_deepspeed.shards import is_divided

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import ModuleType

    from drivetrain_interfaces import StrategyContext
    from torch import nn

_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}


def dividing(
    deepspeed: ModuleType,
    context: StrategyContext,
    values: Mapping[str, Any],
    module: nn.Module | None = None,
    swapper: Any = None,
) -> AbstractContextManager[Any]:
    """``deepspeed.zero.Init`` for the strategy's configuration.

    Args:
        deepspeed: The package.
        context: What the strategy was bound to.
        values: DeepSpeed's configuration, of which it takes what is about dividing and files.
        module: What is divided at once; None divides what is built in the context.
        swapper: What reads and writes files for parameters that were divided before; a second one
            would remove theirs.
    """
    # Its argument dtype is not heard on devices without float16, so that it is configured instead.
    settings = {k: v for k, v in values["zero_optimization"].items() if v != AUTO}
    config: dict[str, Any] = {
        "train_batch_size": context.world.size,
        "zero_optimization": {**settings, "memory_efficient_linear": False},
    }
    if "aio" in values:
        config["aio"] = values["aio"]
    if section := _DTYPES.get(context.precision.policy.parameters):
        config[section] = {"enabled": True}
    made: AbstractContextManager[Any] = deepspeed.zero.Init(
        module=module, config_dict_or_path=config, param_swapper=swapper
    )
    return made


def divide_layer_by_layer(
    deepspeed: ModuleType,
    context: StrategyContext,
    values: Mapping[str, Any],
    module: nn.Module,
    device: torch.device,
) -> None:
    """Give values to what was made on the meta device, one layer at a time, each divided at once.

    Values are those that rank 0 draws with ``reset_parameters``, in the order of the layers.

    Raises:
        ConfigurationError: A layer has no ``reset_parameters``.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parts = list(module.modules())
    swapper = None
    for part in parts:
        others = {id(each) for each in parts if each is not part}
        materialize(part, others, device, initialize=context.world.is_main)
        spread_from_main(part, others, context.collectives)
        if part._parameters:  # noqa: SLF001 - those of its own
            made: Any = dividing(deepspeed, context, values, _Own(part), swapper)
            swapper = made.param_swapper
    for first, *more in names.values():  # a parameter with several names stays one
        for other in more:
            owner, _, attribute = other.rpartition(".")
            setattr(module.get_submodule(owner), attribute, module.get_parameter(first))


class _Own(torch.nn.Module):
    """The parameters of one layer without those of the layers inside it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self._parameters = dict(part._parameters)  # noqa: SLF001 - the same objects


def fill(module: nn.Module, context: StrategyContext, device: torch.device) -> None:
    """Give values to what was made on the meta device, for a stage that divides no parameters."""
    materialize(module, (), device, initialize=True)
    if context.world.size > 1:
        broadcast_module(module, context.collectives)


def has_no_values(module: nn.Module) -> bool:
    """Whether something of it was made on the meta device."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def built_divided(module: nn.Module) -> bool:
    """Whether it was built under ``zero.Init``, and no engine has had it yet."""
    parts = [p for p in module.parameters() if is_divided(p)]
    return bool(parts) and not any(hasattr(p, "full_tensor") for p in parts)


def check_built(module: nn.Module, dtype: torch.dtype) -> None:
    """Refuse what ``zero.Init`` divided in another format than the precision stores.

    Raises:
        ConfigurationError: It did.
    """
    parts: list[Any] = [p for p in module.parameters() if is_divided(p)]
    for parameter in parts:
        found = parameter.dtype  # a part in a file has none
        if found is not dtype:
            raise ConfigurationError(
                f"{type(module).__name__} was built under zero.Init in {found}, and the precision "
                f"stores parameters in {dtype}.",
                "Build it in the context of the strategy's zero_init().",
            )
