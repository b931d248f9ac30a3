"""Placement, state, accelerators, local collectives and checkpoint IO that each break one rule."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from drivetrain_interfaces import ConfigurationError, ModelState
from drivetrain_toolkit import reading
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.collectives import LocalCollectives
from drivetrain_toolkit.strategies import SingleDeviceStrategy
from mutant_parts import Accelerator, Good, strategies

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import World


def alone(strategy: Any) -> dict[str, Any]:
    """Strategies of which the one for one device is another."""
    return strategies(strategy)


# Placement


class AnyOption(SingleDeviceStrategy):
    def _configure(self, options: Mapping[str, Any]) -> None:
        pass


class takes_any_option(Good):
    strategies = alone(AnyOption)


class Unconverted(SingleDeviceStrategy):
    def prepare(self, module: Any) -> Any:
        self._module = module
        return module


class prepare_does_not_convert(Good):
    strategies = alone(Unconverted)


class Rebinding(SingleDeviceStrategy):
    kept: Any = None

    def __call__(self, context: Any) -> Any:
        if Rebinding.kept is None:
            Rebinding.kept = super().__call__(context)
        Rebinding.kept._bound = context
        return Rebinding.kept


class binds_one_strategy_for_all(Good):
    strategies = alone(Rebinding)


class Lists(SingleDeviceStrategy):
    def feed(self, batch: Any) -> Any:
        fed = super().feed(batch)
        if isinstance(fed, dict):
            return {k: list(v) if isinstance(v, tuple) else v for k, v in fed.items()}
        return fed


class feeding_changes_containers(Good):
    strategies = alone(Lists)


class Floats(SingleDeviceStrategy):
    def feed(self, batch: Any) -> Any:
        fed = super().feed(batch)
        if isinstance(fed, dict):
            return {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in fed.items()}
        return fed


class feeding_converts(Good):
    strategies = alone(Floats)


class Pops(SingleDeviceStrategy):
    def feed(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            fed = dict(batch)
            batch.pop("plain")
            return fed
        return super().feed(batch)


class feeding_changes_the_batch(Good):
    strategies = alone(Pops)


class Copies(SingleDeviceStrategy):
    def feed(self, batch: Any) -> Any:
        fed = super().feed(batch)
        return (*[*fed],) if type(fed) is tuple else copy.copy(fed)


class feeding_copies(Good):
    strategies = alone(Copies)


class ClosesOnce(SingleDeviceStrategy):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class closing_twice_fails(Good):
    strategies = alone(ClosesOnce)


KEPT: list[Any] = []


class Keeps(SingleDeviceStrategy):
    def prepare(self, module: Any) -> Any:
        prepared = super().prepare(module)
        KEPT.append(prepared)
        KEPT.extend(torch.zeros_like(p) for p in prepared.parameters() for _ in range(3))
        return prepared


class memory_is_kept(Good):
    class accelerator_type(Accelerator):
        def memory_stats(self, device: Any) -> dict[str, float]:
            held = 1e6 + sum(4 * t.numel() for t in KEPT if isinstance(t, torch.Tensor))
            return {"allocated": held, "peak": held}

    strategies = alone(Keeps)


# Accelerators


class counts_other_devices(Good):
    class accelerator_type(Accelerator):
        def device_count(self) -> int:
            return 7


class overrides_the_users_threads(Good):
    class accelerator_type(Accelerator):
        def activate(self, index: int, local_size: int) -> torch.device:
            self.before = torch.get_num_threads()
            if local_size > 2:
                torch.set_num_threads(self.before + 1)
            return super().activate(index, local_size)

        def close(self) -> None:
            torch.set_num_threads(getattr(self, "before", torch.get_num_threads()))


class leaves_a_variable_behind(Good):
    class accelerator_type(Accelerator):
        def activate(self, index: int, local_size: int) -> torch.device:
            os.environ["ACME_LOCAL_SIZE"] = str(local_size)
            return super().activate(index, local_size)


class accelerator_closes_what_it_opened(Good):
    class accelerator_type(Accelerator):
        opened = False

        def activate(self, index: int, local_size: int) -> torch.device:
            self.opened = True
            return super().activate(index, local_size)

        def close(self) -> None:
            if not self.opened:
                raise RuntimeError("never opened")


class memory_in_megabytes(Good):
    class accelerator_type(Accelerator):
        def memory_stats(self, device: Any) -> dict[str, float]:
            return {"allocated": 1.0, "peak": 2.0}


class memory_without_a_peak(Good):
    class accelerator_type(Accelerator):
        def memory_stats(self, device: Any) -> dict[str, float]:
            return {"allocated": 1e9}


class random_state_is_forgotten(Good):
    class accelerator_type(Accelerator):
        def rng_state(self, device: Any) -> torch.Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
            pass


class device_type_of_another(Good):
    class accelerator_type(Accelerator):
        device_type = "meta"


class BlindToStatistics(SingleDeviceStrategy):
    def _with_sync_batchnorm(self, module: Any) -> Any:
        return module


class ignores_sync_batchnorm(Good):
    strategies = alone(BlindToStatistics)


class LateDevice(SingleDeviceStrategy):
    known = False

    @property
    def device(self) -> torch.device:
        return super().device if self.known else torch.device("meta")

    def prepare(self, module: Any) -> Any:
        self.known = True
        return super().prepare(module)


class device_known_late(Good):
    strategies = alone(LateDevice)


# State


def stating(change: Any) -> dict[str, Any]:
    """Strategies with another state on one device; ``change`` gets the strategy and the state."""

    class Changed(SingleDeviceStrategy):
        def state(self) -> ModelState:
            return change(self, super().state())

    return alone(Changed)


def prefixed(_: Any, state: ModelState) -> ModelState:
    """The names of a wrapper."""
    return replace(state, module={f"module.{k}": v for k, v in state.module.items()})


class state_has_names_of_a_wrapper(Good):
    strategies = stating(prefixed)


def numbered(_: Any, state: ModelState) -> ModelState:
    """Numbers in place of names, as torch has them."""
    optimizers = [{**o, "state": dict(enumerate(o["state"].values()))} for o in state.optimizers]
    return replace(state, optimizers=optimizers)


class optimizer_state_by_number(Good):
    strategies = stating(numbered)


def without_extras(_: Any, state: ModelState) -> ModelState:
    """Groups with torch's own keys alone."""
    optimizers = [
        {**o, "groups": [{k: v for k, v in g.items() if k != "note"} for g in o["groups"]]}
        for o in state.optimizers
    ]
    return replace(state, optimizers=optimizers)


class drops_keys_of_groups(Good):
    strategies = stating(without_extras)


def plain_numbers(_: Any, state: ModelState) -> ModelState:
    """Numbers in place of tensors that hold one."""
    optimizers = [
        {
            **o,
            "state": {
                name: {
                    k: v.item() if isinstance(v, torch.Tensor) and v.dim() == 0 else v
                    for k, v in kept.items()
                }
                for name, kept in o["state"].items()
            },
        }
        for o in state.optimizers
    ]
    return replace(state, optimizers=optimizers)


class numbers_for_tensors(Good):
    strategies = stating(plain_numbers)


def shared(strategy: Any, state: ModelState) -> ModelState:
    """The parameters themselves."""
    return replace(state, module=strategy._module.state_dict())


class state_shares_memory(Good):
    strategies = stating(shared)


def parameters_alone(strategy: Any, state: ModelState) -> ModelState:
    """No buffers."""
    names = {name for name, _ in strategy._module.named_parameters(remove_duplicate=False)}
    return replace(state, module={k: v for k, v in state.module.items() if k in names})


class Lenient(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(state, strict=False)


class LenientParameters(Lenient):
    def state(self) -> ModelState:
        return parameters_alone(self, super().state())


class state_without_buffers(Good):
    strategies = alone(LenientParameters)


class loads_whatever_fits(Good):
    strategies = alone(Lenient)


class Strict(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(state)


class loads_strictly_always(Good):
    strategies = alone(Strict)


class Reshaping(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        mine = self._module.state_dict()
        fitting = {
            k: v for k, v in state.module.items() if k not in mine or mine[k].shape == v.shape
        }
        if len(fitting) < len(state.module):
            strict = False
        super().load(replace(state, module=fitting), strict=strict)


class loads_over_other_shapes(Good):
    strategies = alone(Reshaping)


class NoMoments(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(replace(state, optimizers=()), strict=strict)


class loads_no_optimizer(Good):
    strategies = alone(NoMoments)


class NoScale(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(replace(state, precision={}), strict=strict)


class Resets(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(state, strict=strict)
        if not state.optimizers:
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        optimizer.state[parameter] = {"step": torch.zeros(())}


class weights_alone_touch_the_optimizer(Good):
    strategies = alone(Resets)


class loads_no_scale(Good):
    strategies = alone(NoScale)


class Aliases(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(state, strict=strict)
        for name, parameter in self._module.named_parameters():
            if parameter.dtype == state.module[name].dtype:
                parameter.data = state.module[name]


class loading_shares_memory(Good):
    strategies = alone(Aliases)


class Unties(SingleDeviceStrategy):
    def load(self, state: ModelState, *, strict: bool = True) -> None:
        super().load(state, strict=strict)
        if hasattr(self._module, "outer"):
            self._module.outer.weight = torch.nn.Parameter(self._module.outer.weight.clone())


class loading_unties(Good):
    strategies = alone(Unties)


# A world of one


def lonely(collectives: Any) -> Any:
    """A backend whose collectives of one process are these."""

    class Lonely(Good):
        def collectives(self, world: World) -> Any:
            return collectives() if world.size == 1 else super().collectives(world)

    return Lonely


class MeansIntegers(LocalCollectives):
    def all_reduce(self, tensor: Any, op: Any = None) -> Any:
        return tensor


class reduces_anything_alone(lonely(MeansIntegers)):  # type: ignore[misc]
    pass


class AnySource(LocalCollectives):
    def broadcast(self, tensor: Any, source: int = 0) -> Any:
        return tensor

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value


class broadcasts_from_nobody(lonely(AnySource)):  # type: ignore[misc]
    pass


class GathersTwice(LocalCollectives):
    def all_gather(self, tensor: Any) -> Any:
        return [tensor, tensor]


class gathers_twice_alone(lonely(GathersTwice)):  # type: ignore[misc]
    pass


# Checkpoints


class Pickles:
    """One file that anything can be in, and that can do anything."""

    def save(self, tree: Any, path: str) -> None:
        draft = f"{path}.draft"
        with open(draft, "wb") as file:
            pickle.dump(tree, file)
        os.replace(draft, path)

    def load(self, path: str) -> Any:
        with open(path, "rb") as file:
            return pickle.load(file)

    def exists(self, path: str) -> bool:
        return os.path.isfile(path)

    def remove(self, path: str) -> None:
        if os.path.exists(path):
            os.remove(path)


class checkpoints_are_pickles(Good):
    checkpoint_type = Pickles


class InPlace(DirectoryCheckpointIO):
    def save(self, tree: Any, path: str) -> None:
        self.remove(path)
        super().save(tree, path)


class saving_removes_first(Good):
    checkpoint_type = InPlace


class Trusting(DirectoryCheckpointIO):
    def load(self, path: str) -> Any:
        with mock.patch.object(reading, "_require_hash"):
            return super().load(path)


class loading_trusts_content(Good):
    checkpoint_type = Trusting


class Optimist(DirectoryCheckpointIO):
    def exists(self, path: str) -> bool:
        return os.path.isdir(path)


class any_folder_is_a_checkpoint(Good):
    checkpoint_type = Optimist


class Pedant(DirectoryCheckpointIO):
    def remove(self, path: str) -> None:
        if not os.path.exists(path):
            raise ConfigurationError(f"{path!r} is not there.", "Give another path.")
        super().remove(path)


class removing_nothing_fails(Good):
    checkpoint_type = Pedant


class Rounds(DirectoryCheckpointIO):
    def save(self, tree: Any, path: str) -> None:
        super().save(_rounded(tree), path)


def _rounded(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype is torch.float64:
        return value.float()
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


class saves_in_single_precision(Good):
    checkpoint_type = Rounds


class Silent(DirectoryCheckpointIO):
    def save(self, tree: Any, path: str) -> None:
        super().save(_encodable(tree), path)


def _encodable(tree: Any) -> Any:
    if type(tree) is dict:
        return {k: _encodable(v) for k, v in tree.items()}
    if type(tree) is list:
        return [_encodable(v) for v in tree]
    known = type(tree).__module__ in {
        "builtins", "collections", "numpy", "datetime", "pathlib", "torch", "torch.nn.parameter",
    }  # fmt: skip
    return tree if known and type(tree) is not object and not callable(tree) else repr(tree)


class saves_texts_of_what_it_does_not_know(Good):
    checkpoint_type = Silent


class AlsoTorch(DirectoryCheckpointIO):
    def load(self, path: str) -> Any:
        if os.path.isfile(path):
            return torch.load(path, weights_only=False)
        return super().load(path)


class loads_files_of_torch_save(Good):
    checkpoint_type = AlsoTorch


class OldestFirst(DirectoryCheckpointIO):
    def list(self, directory: str) -> Any:
        return super().list(directory)[::-1]


class lists_the_oldest_first(Good):
    checkpoint_type = OldestFirst
