"""Which hooks somebody overrides, resolved once per run, so that the others cost nothing."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import StepHook

from drivetrain.callbacks.base import Callback
from drivetrain.module import Module

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain.trainer import Trainer

    Calls = tuple[Callable[..., Any], ...]


def overrides(owner: object, base: type, name: str) -> bool:
    """Whether ``owner`` has its own version of a hook that ``base`` leaves empty."""
    own = getattr(owner, name, None)
    if own is None:
        return False
    return getattr(own, "__func__", own) is not getattr(base, name, None)


def trimmed(call: Callable[..., Any], offered: int) -> Callable[..., Any]:
    """``call`` without the trailing arguments that it does not take.

    A user's hook may leave out what it does not need, such as ``dataloader_idx``.
    """
    taken = 0
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return call
        if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}:
            taken += 1
    if taken >= offered:
        return call
    return lambda *args: call(*args[:taken])


def ordered(callbacks: Sequence[Callback]) -> list[Callback]:
    """Callbacks in list order, with those that save checkpoints last."""
    return sorted(callbacks, key=lambda callback: callback.saves_checkpoints)


class Hooks:
    """The overridden hooks of one run: callbacks first, then the module."""

    def __init__(self, trainer: Trainer, module: Module, callbacks: Sequence[Callback]) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks = ordered(callbacks)
        self._tables: dict[str, Calls] = {}

    def table(self, name: str, offered: int = 0) -> Calls:
        """What to call for a hook, in order; empty when nobody overrides it.

        Args:
            name: The hook.
            offered: How many arguments the loop passes.
        """
        if name not in self._tables:
            calls: list[Callable[..., Any]] = [
                partial(trimmed(getattr(each, name), offered + 2), self._trainer, self._module)
                for each in self._callbacks
                if overrides(each, Callback, name)
            ]
            if overrides(self._module, Module, name):
                calls.append(trimmed(getattr(self._module, name), offered))
            self._tables[name] = tuple(calls)
        return self._tables[name]

    def call(self, name: str, *args: Any) -> None:
        """Call a hook that is not on the hot path."""
        for each in self.table(name, len(args)):
            each(*args)

    def owners(self, name: str) -> list[str]:
        """Who overrides a hook, such as ``"Net.on_after_backward"``, for messages."""
        found = [each for each in self._callbacks if overrides(each, Callback, name)]
        names = [f"{type(each).__name__}.{name}" for each in found]
        if overrides(self._module, Module, name):
            names.append(f"{type(self._module).__name__}.{name}")
        return names

    def step_hooks(self) -> dict[StepHook, list[str]]:
        """The moments inside a step that somebody wants, and who."""
        found = {hook: self.owners(f"on_{hook.value}") for hook in StepHook}
        return {hook: names for hook, names in found.items() if names}
