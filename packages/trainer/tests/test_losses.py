"""Losses that are not finite: found at the next look, and said with their step."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from drivetrain_interfaces import NonFiniteLossError

from drivetrain.losses import LossWatch


def watch(policy, *losses):
    made = LossWatch(policy)
    for loss in losses:
        made.add(torch.tensor(loss))
    return made


@pytest.mark.parametrize("policy", ["raise", "warn", "ignore"])
def test_finite_losses_pass(policy, caplog):
    watch(policy, 1.0, 0.0, -3.0).check(0, 3)
    assert not caplog.records


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_loss_is_named_with_step_and_epoch(bad):
    # Ten steps are done, and the last four are looked at: those with the numbers 6 to 9.
    watching = watch("raise", 1.0, 2.0, bad, math.nan)
    with pytest.raises(NonFiniteLossError, match=rf"became {bad} at step 8 \(epoch 2\)") as caught:
        watching.check(2, 10)
    assert "nan_loss='warn'" in caught.value.hint


def test_a_warning_lets_the_run_go_on(caplog):
    watching = watch("warn", math.nan)
    with caplog.at_level(logging.WARNING, logger="drivetrain"):
        watching.check(0, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "at step 0 (epoch 0)" in caplog.text


def test_a_loss_is_looked_at_once():
    watching = watch("raise", math.nan)
    with pytest.raises(NonFiniteLossError):
        watching.check(0, 1)
    watching.check(0, 1)
    watching.add(torch.tensor(1.0))
    watching.check(0, 2)


def test_ignoring_keeps_nothing(caplog):
    watching = watch("ignore", *[math.nan] * 5)
    watching.check(0, 5)
    assert watching._pending == []
    assert not caplog.records


def test_nothing_is_read_back_before_the_check():
    """Tensors of the meta device hold no data: reading one raises."""
    watching = LossWatch("raise")
    for _ in range(100):
        watching.add(torch.ones((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        watching.check(0, 100)


def test_looking_without_losses_is_free():
    LossWatch("raise").check(0, 0)
