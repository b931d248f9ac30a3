"""The Trainer's loop settings: what means nothing is refused, all of it at once."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from drivetrain_interfaces import Clip, ConfigurationError, Feature

from drivetrain.settings import Settings


def test_the_defaults_are_fine():
    settings = Settings()
    assert settings.clip is None
    assert settings.seconds is None
    assert settings.wants == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", -1),
        ("max_epochs", 1.5),
        ("max_epochs", True),
        ("max_steps", -2),
        ("max_steps", None),
        ("max_steps", "10"),
        ("max_time", 5),
        ("max_time", "1:2:3"),
        ("max_time", {"weeks_of_fun": 1}),
        ("check_val_every_n_epoch", 0),
        ("num_sanity_val_steps", -2),
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", {4: 2}),
        ("log_every_n_steps", 0),
        ("limit_train_batches", -1),
        ("limit_val_batches", 1.5),
        ("limit_val_batches", -0.5),
        ("limit_test_batches", "half"),
        ("limit_predict_batches", True),
        ("limit_train_batches", math.nan),
        ("val_check_interval", 0),
        ("val_check_interval", 0.0),
        ("val_check_interval", -3),
        ("val_check_interval", 1.5),
        ("val_check_interval", "epoch"),
        ("val_check_interval", True),
        ("fast_dev_run", -1),
        ("fast_dev_run", "yes"),
        ("fast_dev_run", None),
        ("gradient_clip_val", 0),
        ("gradient_clip_val", -1.0),
        ("gradient_clip_val", math.nan),
        ("gradient_clip_val", "1"),
        ("gradient_clip_algorithm", "l2"),
        ("nan_loss", "stop"),
        ("nan_loss", None),
    ],
)
def test_a_value_that_means_nothing_is_named_and_the_only_problem(name, value):
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{name: value})
    assert name in caught.value.message
    assert repr(value) in caught.value.message
    assert "settings cannot be met" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("max_epochs", None),
        ("max_steps", -1),
        ("max_steps", 0),
        ("limit_train_batches", 0),
        ("limit_train_batches", 500),
        ("limit_val_batches", 0.0),
        ("limit_val_batches", 1.0),
        ("val_check_interval", 1.0),
        ("val_check_interval", 100),
        ("num_sanity_val_steps", -1),
        ("fast_dev_run", True),
        ("fast_dev_run", 3),
        ("gradient_clip_val", 1),
        ("nan_loss", "ignore"),
    ],
)
def test_values_at_the_border_are_taken(name, value):
    assert getattr(Settings(**{name: value}), name) == value


def test_all_problems_are_listed_at_once():
    wrong = {
        "max_epochs": -3,
        "limit_val_batches": 7.5,
        "val_check_interval": "often",
        "gradient_clip_val": "much",
        "max_time": "soon",
        "nan_loss": "panic",
    }
    with pytest.raises(ConfigurationError) as caught:
        Settings(**wrong)
    said = str(caught.value)
    assert said.startswith("6 settings cannot be met:")
    assert all(name in said for name in wrong)


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (timedelta(minutes=2), 120.0),
        ({"hours": 1, "minutes": 1}, 3660.0),
        ("01:02:03:04", 93784.0),
        ("00:00:00:05", 5.0),
        (None, None),
    ],
)
def test_a_time_limit_comes_in_three_forms(duration, seconds):
    assert Settings(max_time=duration).seconds == seconds


def test_a_fit_without_a_limit_is_refused():
    with pytest.raises(ConfigurationError, match="fit was called without a limit"):
        Settings().check_limit_is_set()
    for limit in ({"max_epochs": 0}, {"max_steps": 5}, {"max_time": "00:00:00:01"}):
        Settings(**limit).check_limit_is_set()


def test_clipping_is_by_norm_or_by_value():
    assert Settings(gradient_clip_val=2).clip == Clip(2.0, "norm")
    by_value = Settings(gradient_clip_val=0.5, gradient_clip_algorithm="value")
    assert by_value.clip == Clip(0.5, "value")


def test_settings_say_what_they_need_of_a_strategy_and_by_which_setting():
    settings = Settings(accumulate_grad_batches=4, gradient_clip_val=1.0)
    found = {want.what: want.asked_by for want in settings.wants}
    assert found == {
        Feature.ACCUMULATION: "accumulate_grad_batches=4",
        Feature.CLIP_NORM: "gradient_clip_val=1.0",
    }
    by_value = Settings(gradient_clip_val=1.0, gradient_clip_algorithm="value")
    assert [want.what for want in by_value.wants] == [Feature.CLIP_VALUE]
