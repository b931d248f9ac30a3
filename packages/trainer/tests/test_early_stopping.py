from __future__ import annotations

import math

import pytest
from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks import EarlyStopping


def series(*values, name="val_loss"):
    return lambda epoch: {name: values[epoch]}


def stopped_after(trainer, callback, values, **train):
    """Epochs that ran."""
    trainer.num_val_batches = [1]
    trainer.start(callback).train(len(values), validation=series(*values), **train)
    return trainer.current_epoch


@pytest.mark.parametrize(
    ("arguments", "values", "epochs"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 2], 4),
        ({"patience": 2}, [3, 2, 3, 1, 3, 3, 3], 6),
        ({"patience": 0}, [3, 2, 2, 2], 3),
        ({"patience": 1, "mode": "max"}, [1, 2, 1, 0], 3),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.6, 2.5, 2.4], 2),
        ({"stopping_threshold": 1.0}, [3, 1.0, 0.9, 0.1], 3),
        ({"divergence_threshold": 10}, [3, 10, 11, 1], 3),
        ({"patience": 5}, [3, math.nan, 1, 1], 2),
        ({"patience": 5}, [3, -math.inf, 1, 1], 2),
        ({"patience": 2, "check_finite": False}, [3, math.nan, math.nan, 1], 3),
        ({"patience": 3}, [3, 2, 1], 3),
    ],
)
def test_it_stops_when_the_metric_says_so(trainer, arguments, values, epochs):
    assert stopped_after(trainer, EarlyStopping("val_loss", **arguments), values) == epochs


def test_it_says_why_once(trainer, caplog):
    callback = EarlyStopping("val_loss", patience=1)
    stopped_after(trainer, callback, [1.0, 2.0, 2.0])
    assert callback.stopped_epoch == 1
    assert "has not improved" in callback.reason
    assert [record.getMessage() for record in caplog.records] == ["Stopping: " + callback.reason]


def test_epochs_without_validation_are_not_counted(trainer):
    callback = EarlyStopping("val_loss", patience=2)
    assert stopped_after(trainer, callback, [1, 1, 1, 1, 1, 1, 1], validate_each=2) == 6
    assert callback.wait_count == 2


def test_a_training_metric_is_checked_at_the_end_of_the_epoch(trainer):
    callback = EarlyStopping("loss", patience=1)
    trainer.num_val_batches = [1]
    trainer.start(callback)
    trainer.train(4, validation=series(1, 1, 1, 1), training=series(2, 2, 2, 2, name="loss"))
    assert trainer.current_epoch == 2


def test_checking_at_the_end_of_the_epoch_counts_a_validation_once(trainer):
    callback = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=True)
    assert stopped_after(trainer, callback, [1, 1, 1, 1, 1], validate_each=2) == 4


def test_checking_after_validation_only(trainer):
    callback = EarlyStopping("loss", patience=1, check_on_train_epoch_end=False)
    trainer.callback_metrics["loss"] = 1.0
    trainer.start(callback).train(3)
    assert callback.wait_count == 0
    trainer.train(2, validation=series(0, 0, 0, 1, 1))
    assert trainer.should_stop


def test_a_metric_that_nobody_logs_is_an_error(trainer):
    with pytest.raises(ConfigurationError, match=r"'val_los'.*\(val_loss\)"):
        stopped_after(trainer, EarlyStopping("val_los"), [1.0])


def test_without_strict_it_warns_once(trainer, caplog):
    callback = EarlyStopping("val_los", strict=False)
    assert stopped_after(trainer, callback, [1.0, 1.0, 1.0]) == 3
    assert len(caplog.records) == 1


def test_a_metric_may_wait_for_the_first_validation(trainer):
    callback = EarlyStopping("val_loss", patience=1)
    assert stopped_after(trainer, callback, [1, 1, 1, 1, 1, 1], validate_each=3) == 6


def test_a_resumed_run_remembers(trainer, make_trainer):
    first = EarlyStopping("val_loss", patience=3)
    stopped_after(trainer, first, [1.0, 2.0, 2.0])
    second = EarlyStopping("val_loss", patience=3)
    resumed = make_trainer(num_val_batches=[1], current_epoch=3, global_step=12).start(second)
    second.load_state_dict(first.state_dict())
    resumed.train(3, validation=lambda epoch: {"val_loss": 2.0})
    assert resumed.current_epoch == 4
    assert second.best_score == 1.0


def test_a_second_fit_forgets_the_first(trainer):
    callback = EarlyStopping("val_loss", patience=2)
    stopped_after(trainer, callback, [1.0, 2.0, 2.0])
    trainer.should_stop, trainer.current_epoch = False, 0
    assert stopped_after(trainer, callback, [5.0, 4.0, 3.0]) == 3
    assert callback.best_score == 3.0


def test_all_ranks_follow_rank_0(ranks, caplog):
    values = [1, 2, 2, 2], [4, 3, 2, 1]
    epochs = []
    for trainer, own in zip(ranks, values, strict=True):
        epochs.append(stopped_after(trainer, EarlyStopping("val_loss", patience=2), own))
    assert epochs == [3, 3]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("arguments", [{"patience": -1}, {"min_delta": -1}, {"mode": "low"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="EarlyStopping was given"):
        EarlyStopping("val_loss", **arguments)
