from __future__ import annotations

import math
from datetime import timedelta

import pytest
from drivetrain_interfaces import ConfigurationError

from drivetrain.callbacks import Timer
from drivetrain.callbacks.base import Moment


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""
    now = [1000.0]
    monkeypatch.setattr("drivetrain.callbacks.timer.time.monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (timedelta(minutes=2), 120),
        ({"hours": 1, "minutes": 1}, 3660),
        ("01:02:03:04", 93784),
        ("00:00:00:05", 5),
        (None, math.inf),
    ],
)
def test_durations_come_in_three_forms(duration, seconds):
    assert Timer(duration).duration == seconds


@pytest.mark.parametrize("duration", ["1:2:3", "soon", {"fortnights": 1}, 5])
def test_what_is_no_duration_is_refused(duration):
    with pytest.raises(ConfigurationError, match="is not a duration"):
        Timer(duration)


def test_an_unknown_interval_is_refused():
    with pytest.raises(ConfigurationError, match="interval='batch'"):
        Timer(None, "batch")


def steps(trainer, clock, count, seconds):
    """Steps of so many seconds until the trainer is told to stop; how many ran."""
    for done in range(count):
        if trainer.should_stop:
            return done
        clock(seconds)
        trainer.global_step += 1
        trainer.hook("on_save_opportunity", Moment.STEP)
    return count


def test_it_stops_at_the_first_log_point_after_the_budget(trainer, clock, caplog):
    trainer.log_every_n_steps = 4
    timer = Timer(timedelta(seconds=50))
    trainer.start(timer)
    trainer.hook("on_train_start")
    assert steps(trainer, clock, 20, 10) == 8
    assert timer.time_elapsed() == 80
    assert timer.time_remaining() == 0
    assert len(caplog.records) == 1


def test_it_may_finish_the_epoch_first(trainer, clock):
    trainer.start(Timer(timedelta(seconds=50), "epoch"))
    trainer.hook("on_train_start")
    assert steps(trainer, clock, 20, 10) == 20
    trainer.hook("on_save_opportunity", Moment.EPOCH)
    assert trainer.should_stop


def test_without_a_limit_it_only_measures(trainer, clock):
    timer = Timer()
    trainer.start(timer)
    trainer.hook("on_train_start")
    steps(trainer, clock, 5, 10)
    clock(5)
    trainer.end()
    clock(100)
    assert timer.time_elapsed() == 55
    assert timer.time_remaining() == math.inf
    assert trainer.collectives.count == 0


def test_time_of_earlier_processes_counts(trainer, make_trainer, clock):
    first = Timer(timedelta(seconds=50))
    trainer.start(first)
    trainer.hook("on_train_start")
    steps(trainer, clock, 3, 10)
    second = Timer(timedelta(seconds=50))
    resumed = make_trainer(global_step=3).start(second)
    second.load_state_dict(first.state_dict())
    resumed.hook("on_train_start")
    assert steps(resumed, clock, 10, 10) == 2

    spent = Timer(timedelta(seconds=50))
    at_once = make_trainer(global_step=5).start(spent)
    spent.load_state_dict(second.state_dict())
    at_once.hook("on_train_start")
    assert at_once.should_stop


def test_a_second_fit_has_the_whole_budget(trainer, clock):
    timer = Timer(timedelta(seconds=50))
    trainer.start(timer)
    trainer.hook("on_train_start")
    steps(trainer, clock, 9, 10)
    trainer.end()
    trainer.should_stop = False
    trainer.start(timer)
    trainer.hook("on_train_start")
    assert steps(trainer, clock, 9, 10) == 5


def test_rank_0_decides_for_all(ranks, clock):
    counts = []
    for trainer, seconds in zip(ranks, (10, 0), strict=True):
        trainer.log_every_n_steps = 2
        trainer.start(Timer(timedelta(seconds=30)))
        trainer.hook("on_train_start")
        counts.append(steps(trainer, clock, 10, seconds))
    assert counts == [4, 4]
    assert ranks[0].collectives.count == ranks[1].collectives.count == 3  # the start, and two steps
