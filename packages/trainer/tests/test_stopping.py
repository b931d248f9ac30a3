"""Stopping: signals set a flag, the loop acts at a boundary, and all ranks take the same one."""

from __future__ import annotations

import pickle
import signal
import threading

import pytest
from drivetrain_interfaces import ProcessFailedError, World

from drivetrain import stopping
from drivetrain.stopping import Interrupted, StopRequest


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_sets_a_flag_and_the_next_window_does_not_begin(number):
    with StopRequest(World(), None, "fit") as stop:
        assert stop.begin(1)
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal is number
        assert stop.ends_evaluation
        assert not stop.begin(2)


def test_a_second_ctrl_c_means_now():
    with StopRequest(World(), None, "fit") as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal is signal.SIGINT


def test_a_second_sigterm_waits_for_the_boundary_too():
    with StopRequest(World(), None, "fit") as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM


def test_handlers_are_those_from_before_also_after_an_error():
    def own(_number, _frame):
        """The user's handler."""

    def fail():
        with StopRequest(World(), None, "fit"):
            assert signal.getsignal(signal.SIGTERM) is not own
            raise RuntimeError("broken")

    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(RuntimeError, match="broken"):
            fail()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGINT)

    def main():
        with StopRequest(World(), None, "fit") as stop:
            assert signal.getsignal(signal.SIGINT) is before
            return stop.begin(1)

    ranks = Ranks()
    ranks.start(0, main)
    assert ranks.finish() == {0: True}


def test_a_stop_without_a_signal_has_none():
    with StopRequest(World(), None, "fit") as stop:
        stop.ask()
        assert not stop.begin(1)
        assert stop.signal is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_has_the_exit_code_of_its_signal(number, code):
    error = Interrupted(number)
    assert isinstance(error, SystemExit)
    assert error.code == code
    assert error.signal is number
    assert pickle.loads(pickle.dumps(error)).code == code


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
    assert entries == {"fit/begun/0": b"7"}

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


def test_an_evaluation_goes_on_where_other_ranks_would_wait():
    with StopRequest(place(0, 2), Channel({}), "fit") as stop:
        stop.requested = True
        assert not stop.ends_evaluation
        stop.requested = False


def test_runs_with_different_names_do_not_stop_each_other():
    entries = {"first/stop": b"15", "first/begun/0": b"3", "first/begun/1": b"3"}
    with StopRequest(place(0, 2), Channel(entries), "second") as stop:
        assert all(stop.begin(window) for window in range(1, 1000))
    assert entries["second/begun/0"] == b"999"
