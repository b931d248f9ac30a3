"""Random number generators: seeding them, and their state as a tree that a checkpoint can hold."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from drivetrain_interfaces import SupportsRng

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import Accelerator

#: Children of a launcher inherit it, so that all ranks shuffle alike.
SEED_VARIABLE = "DRIVETRAIN_SEED"
_LARGEST = 2**32 - 1


def seed_everything(seed: int) -> int:
    """Seed Python, NumPy and torch, and the order in which the Trainer draws samples.

    Args:
        seed: From 0 to 2**32 - 1, the range that NumPy takes.

    Raises:
        ValueError: The seed is outside that range.
    """
    if not 0 <= seed <= _LARGEST:
        raise ValueError(f"seed {seed} is outside 0 to {_LARGEST}")
    os.environ[SEED_VARIABLE] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def data_seed() -> int:
    """The seed of the sample order: the one of ``seed_everything``, or torch's own."""
    given = os.environ.get(SEED_VARIABLE)
    return int(given) if given is not None else torch.initial_seed() % _LARGEST


def host_rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's host generators, as JSON values and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
    }


class RandomStream:
    """Generators of the host of one's own: inside ``with`` they take the place of the real ones.

    What is drawn inside depends on the seed alone, and what is drawn outside does not notice. May
    be entered again, where it goes on. Devices are not touched.

    Args:
        seed: Where it begins.
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._states: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        outside = _states()
        if self._seed is not None:
            seed_host(self._seed)
            self._seed = None
        else:
            _set_states(self._states)
        self._states = outside

    def __exit__(self, *exc: object) -> None:
        inside = _states()
        _set_states(self._states)
        self._states = inside


def seed_host(seed: int) -> None:
    """Seed Python's, NumPy's and torch's host generators, and none of a device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_states(states: tuple[Any, ...]) -> None:
    python, numpy, torchs = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torchs)


def rng_state(accelerator: Accelerator, device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process, that of its device included."""
    state = host_rng_state()
    if isinstance(accelerator, SupportsRng):
        state["device"] = accelerator.rng_state(device)
    return state


def set_host_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what ``host_rng_state`` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])


def set_rng_state(state: Mapping[str, Any], accelerator: Accelerator, device: torch.device) -> None:
    """Restore what ``rng_state`` returned; a device generator only if the device has one."""
    set_host_rng_state(state)
    if "device" in state and isinstance(accelerator, SupportsRng):
        accelerator.set_rng_state(state["device"], device)
