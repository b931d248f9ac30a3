from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks import LearningRateMonitor
from drivetrain.callbacks.base import Moment


def sgd(*rates, **options):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, **options)


def scheduled(index, interval, name=None):
    return SimpleNamespace(optimizer_index=index, interval=interval, name=name)


def test_it_logs_at_log_points_under_the_step_that_uses_the_rate(trainer):
    trainer.log_every_n_steps = 3
    optimizer = sgd(0.1)
    trainer.optimizers = [optimizer]
    trainer.start(LearningRateMonitor())
    trainer.hook("on_train_start")
    for step in range(1, 7):
        optimizer.param_groups[0]["lr"] = 0.1 * step
        trainer.hook("on_train_batch_start", None, step - 1)
        trainer.global_step = step
        trainer.hook("on_save_opportunity", Moment.STEP)
    assert trainer.logged == [
        (3, {"lr-SGD": pytest.approx(0.3)}),
        (6, {"lr-SGD": pytest.approx(0.6)}),
    ]


def test_batches_of_one_window_log_once(trainer):
    trainer.optimizers = [sgd(0.1)]
    trainer.start(LearningRateMonitor())
    trainer.hook("on_train_start")
    for index in range(4):
        trainer.hook("on_train_batch_start", None, index)
    assert trainer.logged == [(1, {"lr-SGD": 0.1})]


def test_groups_and_optimizers_have_names_of_their_own(trainer):
    named = sgd(0.3, 0.4)
    named.param_groups[1]["name"] = "head"
    trainer.optimizers = [sgd(0.1, 0.2), named, torch.optim.Adam(named.param_groups[0]["params"])]
    trainer.schedulers = [scheduled(2, "step", "rate")]
    trainer.start(LearningRateMonitor()).train(1, steps=1)
    assert trainer.logged == [
        (
            1,
            {
                "lr-SGD/pg1": 0.1,
                "lr-SGD/pg2": 0.2,
                "lr-SGD-1/pg1": 0.3,
                "lr-SGD-1/head": 0.4,
                "rate": 0.001,
            },
        )
    ]


def test_momentum_is_logged_when_asked_for(trainer):
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5, betas=(0.8, 0.9))
    trainer.optimizers = [sgd(0.1, momentum=0.9), adam]
    trainer.start(LearningRateMonitor(log_momentum=True)).train(1, steps=1)
    assert trainer.logged[0][1] == {
        "lr-SGD": 0.1,
        "lr-SGD-momentum": 0.9,
        "lr-Adam": 0.5,
        "lr-Adam-momentum": 0.8,
    }


@pytest.mark.parametrize(
    ("asked", "interval", "steps"),
    [
        (None, "epoch", [1, 5]),
        (None, "step", [2, 4, 6, 8]),
        ("step", "epoch", [2, 4, 6, 8]),
        ("epoch", "step", [1, 5]),
    ],
)
def test_the_interval_follows_the_scheduler_unless_it_is_given(trainer, asked, interval, steps):
    trainer.log_every_n_steps = 2
    trainer.optimizers = [sgd(0.1)]
    trainer.schedulers = [scheduled(0, interval)]
    trainer.start(LearningRateMonitor(asked)).train(2)
    assert [step for step, _ in trainer.logged] == steps


def test_an_unknown_interval_is_refused():
    with pytest.raises(ConfigurationError, match="logging_interval='batch'"):
        LearningRateMonitor("batch")
