"""The broken parts of ``mutants.py``: one class for each mutant, named as it is."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from drivetrain_interfaces import UnavailableError, UnsupportedError
from drivetrain_interfaces.errors import listed
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.collectives import LocalCollectives, TorchCollectives
from drivetrain_toolkit.precision import make_precision
from drivetrain_toolkit.specs import PRECISIONS
from drivetrain_toolkit.strategies import DDPStrategy, SingleDeviceStrategy
from mutants import FACTS

if TYPE_CHECKING:
    from drivetrain_interfaces import Backend, StrategyContext, World

BACKENDS: dict[str, type[Good]] = {}


def backend(name: str) -> Backend:
    """The backend of that name; its module registers it when it is imported."""
    for module in ("mutant_steps", "mutant_precisions", "mutant_states", "mutant_ranks"):
        importlib.import_module(module)
    return BACKENDS[name]()


class Accelerator:
    """The CPU, as the accelerator contract wants it."""

    facts = FACTS
    device_type = "cpu"

    def device_count(self) -> int:
        return 2

    def activate(self, index: int, local_size: int) -> torch.device:
        if not 0 <= index < self.device_count():
            raise UnavailableError(
                f"Device {index} of 'good' was asked for, which has {self.device_count()}.",
                "Ask for 0 or 1.",
            )
        return torch.device("cpu")

    def synchronize(self, device: torch.device) -> None:
        pass

    def close(self) -> None:
        pass


def strategies(single: Any = SingleDeviceStrategy, several: Any = DDPStrategy) -> dict[str, Any]:
    """Strategies by name."""
    return {"single_device": single, "ddp": several}


class Good:
    """A backend of toolkit parts that breaks nothing. A mutant replaces one of its parts."""

    accelerator_type: Any = Accelerator
    strategies: Any = strategies()
    collectives_type: Any = TorchCollectives
    checkpoint_type: Any = DirectoryCheckpointIO

    def __init_subclass__(cls) -> None:
        BACKENDS[cls.__name__] = cls

    def accelerator(self) -> Any:
        return self.accelerator_type()

    def precision(self, name: str) -> Any:
        if name not in PRECISIONS:
            raise UnsupportedError(
                f"The 'good' backend was asked for precision {name!r}.",
                f"Use one of: {listed(PRECISIONS)}.",
            )
        return make_precision(name, "cpu")

    def collectives(self, world: World) -> Any:
        return LocalCollectives() if world.size == 1 else self.collectives_type(world, "gloo")

    def strategy(self, name: str, context: StrategyContext) -> Any:
        if name not in self.strategies:
            raise UnsupportedError(
                f"The 'good' backend was asked for strategy {name!r}.",
                f"Use one of: {listed(self.strategies)}.",
            )
        return self.strategies[name]()(context)

    def launcher(self, name: str) -> Any:
        return None

    def checkpoint_io(self) -> Any:
        return self.checkpoint_type()


BACKENDS["good"] = Good


# Names, factories and texts


class any_precision(Good):
    def precision(self, name: str) -> Any:
        return make_precision(name if name in PRECISIONS else "32-true", "cpu")


class misnamed_precision(Good):
    def precision(self, name: str) -> Any:
        made = super().precision(name)
        made.name = f"good-{name}"
        return made


class refusal_lists_nothing(Good):
    def precision(self, name: str) -> Any:
        if name not in PRECISIONS:
            raise UnsupportedError(f"Precision {name!r} was asked for.", "Use another one.")
        return super().precision(name)


class refusal_is_a_key_error(Good):
    def precision(self, name: str) -> Any:
        if name not in PRECISIONS:
            raise KeyError(name)
        return super().precision(name)


class refusal_apologizes(Good):
    def strategy(self, name: str, context: StrategyContext) -> Any:
        if name not in self.strategies:
            raise UnsupportedError(
                f"Sorry, there is no strategy {name!r}.", f"Use {listed(self.strategies)}."
            )
        return super().strategy(name, context)


class any_strategy(Good):
    def strategy(self, name: str, context: StrategyContext) -> Any:
        return super().strategy(name if name in self.strategies else "single_device", context)


class one_accelerator_for_all(Good):
    kept = Accelerator()

    def accelerator(self) -> Any:
        return self.kept


class facts_of_another(Good):
    class accelerator_type(Accelerator):
        facts = replace(FACTS, default_devices=7)


class accelerator_without_close(Good):
    class accelerator_type:
        facts, device_type = FACTS, "cpu"
        device_count, activate = Accelerator.device_count, Accelerator.activate
        synchronize = Accelerator.synchronize


class launcher_made_up(Good):
    def launcher(self, name: str) -> Any:
        from drivetrain_toolkit.launchers import spawn

        return spawn()
