"""Stopping: signals set a flag, the loop acts at a boundary, and all ranks take the same one."""

from __future__ import annotations

import signal
import threading

import pytest
from drivetrain_interfaces import ProcessFailedError, World

from drivetrain import stopping
from drivetrain.signals import SignalAction, SignalPolicy
from drivetrain.stopping import StopRequest


class Channel:
    """A side channel of one rank; all of a run share the same entries."""

    def __init__(self, entries):
        self.entries = entries
        self.closed = 0

    def post(self, key, value):
        assert not self.closed
        self.entries[key] = value

    def peek(self, key):
        assert not self.closed
        return self.entries.get(key)

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.01)


def place(rank, size):
    return World(rank, size, rank, size, address="localhost", port=1)


def run_until_stopped(stop, begun=0):
    """Go on with windows until told to stop; returns the number of the window that never began."""
    while stop.begin(begun + 1):
        begun += 1
    return begun + 1


class Ranks:
    """Threads that each do what a rank's main thread does."""

    def __init__(self):
        self.threads = []
        self.results = {}
        self.errors = []

    def start(self, rank, main, *args):
        def work():
            try:
                self.results[rank] = main(*args)
            except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
                self.errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()

    def finish(self):
        for thread in self.threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]
        return self.results


# One process
def test_a_run_that_nobody_stops_begins_every_window():
    with StopRequest(World(), None, "fit") as stop:
        assert all(stop.begin(window) for window in range(1, 100))
        assert stop.signal is None


def test_a_stop_without_a_signal_has_none():
    with StopRequest(World(), None, "fit") as stop:
        stop.ask()
        assert not stop.begin(1)
        assert stop.signal is None


# Several processes
@pytest.mark.parametrize("asking", [0, 1, 2])
def test_ranks_at_different_windows_all_stop_before_the_same_one(asking):
    entries, size = {}, 3
    there, release = threading.Barrier(size + 1), threading.Event()
    stops = {}

    def main(rank):
        channel = Channel(entries)
        with StopRequest(place(rank, size), channel, "fit") as stop:
            stops[rank] = stop
            begun = 5 + 10 * rank
            assert all(stop.begin(window) for window in range(1, begun + 1))
            there.wait(timeout=30)
            assert release.wait(timeout=30)
            stopped = run_until_stopped(stop, begun)
        assert channel.closed == 1
        return stopped, stop.signal

    ranks = Ranks()
    for rank in range(size):
        ranks.start(rank, main, rank)
    there.wait(timeout=30)
    stops[asking].ask(signal.SIGTERM)
    release.set()
    found = set(ranks.finish().values())
    assert len(found) == 1
    ((window, number),) = found
    assert window > 25
    assert number is signal.SIGTERM


def test_a_rank_that_is_busy_does_not_hold_up_the_agreement_of_the_others():
    """Rank 1 hangs in a collective of window 4; its thread speaks for it."""
    entries = {}
    here, free = threading.Event(), threading.Event()

    def busy():
        with StopRequest(place(1, 2), Channel(entries), "fit") as stop:
            assert all(stop.begin(window) for window in range(1, 5))
            here.set()
            assert free.wait(timeout=30)
            return run_until_stopped(stop, 4)

    ranks = Ranks()
    ranks.start(1, busy)
    assert here.wait(timeout=30)
    with StopRequest(place(0, 2), Channel(entries), "fit") as stop:
        assert stop.begin(1)
        stop.ask(signal.SIGINT)
        first = run_until_stopped(stop, 1)
        free.set()
    assert ranks.finish() == {1: first}
    assert first >= 5


def test_a_rank_that_reads_late_hears_what_the_others_heard():
    """Rank 1 learns where rank 0 is only when rank 0 is gone."""
    entries, gone = {}, threading.Event()

    class Late(Channel):
        def peek(self, key):
            return None if key.endswith("begun/0") and not gone.is_set() else super().peek(key)

    there = threading.Event()

    def late():
        with StopRequest(place(1, 2), Late(entries), "fit") as stop:
            assert stop.begin(1)
            there.set()
            assert gone.wait(timeout=30)
            return run_until_stopped(stop, 1)

    ranks = Ranks()
    ranks.start(1, late)
    assert there.wait(timeout=30)
    with StopRequest(place(0, 2), Channel(entries), "fit") as stop:
        stop.ask(signal.SIGTERM)
        first = run_until_stopped(stop)
    gone.set()
    assert ranks.finish() == {1: first}


def test_a_rank_that_ended_at_its_limit_does_not_hang_the_others():
    entries = {}
    with StopRequest(place(0, 3), Channel(entries), "fit") as ended:
        assert all(ended.begin(window) for window in range(1, 8))
    assert entries == {"fit/begun/0": f"{7 << 48} 0".encode()}

    def main(rank):
        with StopRequest(place(rank, 3), Channel(entries), "fit") as stop:
            assert stop.begin(1)
            if rank == 1:
                stop.ask(signal.SIGTERM)
            return run_until_stopped(stop, 1)

    ranks = Ranks()
    for rank in (1, 2):
        ranks.start(rank, main, rank)
    found = ranks.finish()
    assert found[1] == found[2] >= 8


def test_a_silent_rank_is_an_error_and_not_a_hang(monkeypatch):
    monkeypatch.setattr(stopping, "AGREE_SECONDS", 0.2)
    with StopRequest(place(0, 2), Channel({}), "fit") as stop:
        stop.ask(signal.SIGTERM)
        with pytest.raises(ProcessFailedError, match=r"Rank 0 was asked .* of the 2 ranks"):
            run_until_stopped(stop)


def test_a_rank_that_failed_says_nothing_more():
    """The channel may be gone with the rank that hosts it; the first error is the one to see."""
    entries = {}

    def fail():
        with StopRequest(place(1, 2), Channel(entries), "fit") as stop:
            stop.begin(1)
            raise RuntimeError("the first error")

    with pytest.raises(RuntimeError, match="the first error"):
        fail()
    assert entries == {}


@pytest.mark.parametrize("further", [0, 1])
def test_ranks_inside_an_evaluation_stop_after_the_same_batch(further):
    entries, there = {}, threading.Barrier(3)

    def main(rank, ahead):
        with StopRequest(place(rank, 2), Channel(entries), "run") as stop:
            assert stop.begin(1)
            stop.begin_evaluation()
            done = 3 + ahead
            assert all(stop.begin_batch() for _ in range(done))
            there.wait(timeout=30)
            if rank == 0:
                stop.ask(signal.SIGTERM)
            while stop.begin_batch():
                done += 1
            return done

    ranks = Ranks()
    for rank in range(2):
        ranks.start(rank, main, rank, 4 if rank == further else 0)
    there.wait(timeout=30)
    found = ranks.finish()
    assert found[0] == found[1] >= 7


def test_a_rank_that_waits_at_the_end_of_an_evaluation_makes_the_others_finish_it():
    """It has fewer batches; what it waits in needs all ranks."""
    entries, waits = {}, threading.Event()

    def short():
        with StopRequest(place(0, 2), Channel(entries), "run") as stop:
            stop.begin_evaluation()
            ends = [stop.begin_batch(), stop.end_batches()]
            waits.set()
            return [*ends, run_until_stopped(stop)]

    def long():
        with StopRequest(place(1, 2), Channel(entries), "run") as stop:
            stop.begin_evaluation()
            assert stop.begin_batch()
            assert waits.wait(timeout=30)
            stop.ask(signal.SIGTERM)
            ends = [all(stop.begin_batch() for _ in range(50)), stop.end_batches()]
            return [*ends, run_until_stopped(stop)]

    ranks = Ranks()
    ranks.start(0, short)
    ranks.start(1, long)
    found = ranks.finish()
    assert found[0][:2] == found[1][:2] == [True, True]
    assert found[0][2] == found[1][2]


def test_a_rank_at_the_end_of_its_batches_stops_with_those_that_stop_before():
    with StopRequest(World(), None, "run") as stop:
        stop.begin_evaluation()
        assert stop.begin_batch()
        stop.ask(signal.SIGTERM)
        assert not stop.end_batches()


def test_of_two_signals_the_one_that_asks_for_more_decides_on_all_ranks():
    """A scheduler's warning to one rank and a plain stop to the other."""
    entries = {}
    policy = SignalPolicy({"SIGUSR1": "requeue", "SIGTERM": "stop"})

    def main(rank, number):
        with StopRequest(place(rank, 2), Channel(entries), "run", policy) as stop:
            stop.ask(number)
            run_until_stopped(stop)
            return stop.signal, stop.action

    ranks = Ranks()
    ranks.start(0, main, 0, signal.SIGTERM)
    ranks.start(1, main, 1, signal.SIGUSR1)
    found = ranks.finish()
    # The second may have come too late to count; then neither rank knows of it.
    assert found[0] == found[1]
    assert found[0] in {
        (signal.SIGUSR1, SignalAction.REQUEUE),
        (signal.SIGTERM, SignalAction.STOP),
    }


def test_runs_with_different_names_do_not_stop_each_other():
    entries = {"first/stop": b"1", "first/begun/0": b"3 15", "first/begun/1": b"3 15"}
    with StopRequest(place(0, 2), Channel(entries), "second") as stop:
        assert all(stop.begin(window) for window in range(1, 1000))
    assert entries["second/begun/0"] == f"{999 << 48} 0".encode()
