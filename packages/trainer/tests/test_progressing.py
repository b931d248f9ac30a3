"""Whether any rank moves: this one by a number it counts up, the others by what they posted."""

from __future__ import annotations

import pytest
from drivetrain_interfaces import World

from drivetrain import progressing
from drivetrain.progressing import Progressing


class Clock:
    """Stands still unless told."""

    now = 1000.0

    def monotonic(self):
        return self.now


class Entries(dict):
    """The side channel of all ranks."""

    post = dict.__setitem__
    peek = dict.get


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progressing, "time", clock)
    return clock


def rank(number, entries, timeout=10.0):
    world = World(number, 2, number, 2, address="localhost", port=1)
    made = Progressing(world, entries, "run", timeout)
    made.steps = 0
    return made


def pass_time(clock, seconds, *ranks):
    """Let time pass in quarters of a second; what each rank then says about a stall."""
    found = []
    for _ in range(int(seconds * 4)):
        clock.now += 0.25
        found = []
        for each in ranks:
            each.share()
            found.append(each.stalled())
    return found


def test_set_up_is_no_stall(clock):
    first = rank(0, Entries())
    assert pass_time(clock, 100, first) == [False]
    assert first.idle == 0.0


def test_ranks_that_all_stand_still_for_the_timeout_are_stalled(clock):
    entries = Entries()
    ranks = [rank(0, entries), rank(1, entries)]
    for each in ranks:
        each.begin(lambda: 7)
    assert pass_time(clock, 9.5, *ranks) == [False, False]
    assert pass_time(clock, 2, *ranks) == [True, True]


def test_a_rank_that_waits_for_one_that_moves_is_not_stalled(clock):
    """As while rank 1 writes a checkpoint, and says so."""
    entries = Entries()
    waits, works = rank(0, entries), rank(1, entries)
    waits.begin(lambda: 7)
    works.begin(lambda: 7)
    for _ in range(20):
        works.alive()
        assert pass_time(clock, 3, waits, works) == [False, False]


def test_without_a_timeout_nothing_stalls_and_nothing_is_posted(clock):
    entries = Entries()
    alone = rank(0, entries, None)
    alone.begin(lambda: 7)
    assert pass_time(clock, 1000, alone) == [False]
    assert entries == {}
