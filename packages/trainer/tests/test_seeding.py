"""Seeds, and the state of every generator as a tree that a checkpoint can hold."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from drivetrain.evaluate import isolated
from drivetrain.seeding import (
    SEED_VARIABLE,
    data_seed,
    host_rng_state,
    rng_state,
    seed_everything,
    set_host_rng_state,
    set_rng_state,
)

HOST = torch.device("cpu")


class OwnGenerator:
    """An accelerator with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def rng_state(self, device):
        return self.generator.get_state()

    def set_rng_state(self, state, device):
        self.generator.set_state(state)

    def draw(self):
        return torch.rand((), generator=self.generator).item()


@pytest.fixture(autouse=True)
def _own_generators(monkeypatch):
    """Seeding changes the process; what was there before comes back."""
    monkeypatch.setenv(SEED_VARIABLE, "0")
    before = host_rng_state()
    yield
    set_host_rng_state(before)


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.standard_normal(),
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


def test_a_seed_fixes_all_generators():
    assert seed_everything(5) == 5
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_order_of_samples_follows_the_seed():
    seed_everything(2**32 - 1)
    assert data_seed() == 2**32 - 1


def test_without_a_seed_the_order_follows_torch_s(monkeypatch):
    monkeypatch.delenv(SEED_VARIABLE)
    torch.manual_seed(12)
    assert data_seed() == 12


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_and_changes_nothing(seed):
    before = draw, host_rng_state()["torch"]
    with pytest.raises(ValueError, match=f"seed {seed} is outside 0 to 4294967295"):
        seed_everything(seed)
    assert torch.equal(host_rng_state()["torch"], before[1])
    assert data_seed() == 0


def test_a_restored_state_draws_the_same_numbers():
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number for later
    state = host_rng_state()
    first = draw()
    set_host_rng_state(state)
    assert draw() == first


def test_the_state_is_json_and_tensors():
    state = host_rng_state()
    first = draw()

    def encoded(part):
        return {"tensor": part.tolist(), "dtype": str(part.dtype).partition(".")[2]}

    def decoded(part):
        if set(part) == {"tensor", "dtype"}:
            return torch.tensor(part["tensor"], dtype=getattr(torch, part["dtype"]))
        return part

    text = json.dumps(state, default=encoded)
    set_host_rng_state(json.loads(text, object_hook=decoded))
    assert draw() == first


def test_the_generator_of_a_device_is_part_of_the_state():
    accelerator = OwnGenerator()
    state = rng_state(accelerator, HOST)
    first = [accelerator.draw(), *draw()]
    set_rng_state(state, accelerator, HOST)
    assert [accelerator.draw(), *draw()] == first


def test_a_state_from_a_device_without_a_generator_restores_the_host():
    state = rng_state(object(), HOST)
    assert "device" not in state
    first = draw()
    accelerator = OwnGenerator()
    before = accelerator.rng_state(HOST)
    set_rng_state(state, accelerator, HOST)
    assert draw() == first
    assert torch.equal(accelerator.rng_state(HOST), before)


def test_a_state_from_a_device_with_a_generator_restores_on_one_without():
    state = rng_state(OwnGenerator(), HOST)
    first = draw()
    set_rng_state(state, object(), HOST)
    assert draw() == first


def test_what_is_drawn_in_isolation_has_no_effect_outside():
    accelerator = OwnGenerator()
    state = rng_state(accelerator, HOST)
    undisturbed = [accelerator.draw(), *draw()]
    set_rng_state(state, accelerator, HOST)
    with isolated(accelerator, HOST):
        draw(), accelerator.draw()
    assert [accelerator.draw(), *draw()] == undisturbed


def test_an_error_in_isolation_has_no_effect_outside_either():
    accelerator = OwnGenerator()
    state = rng_state(accelerator, HOST)
    undisturbed = draw()
    set_rng_state(state, accelerator, HOST)

    def fail():
        draw()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), isolated(accelerator, HOST):
        fail()
    assert draw() == undisturbed
