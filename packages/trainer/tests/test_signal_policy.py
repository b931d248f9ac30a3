"""What signals do to a run: the policy as written, and handlers that only set a flag."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from drivetrain_interfaces import ConfigurationError

from drivetrain import Callback, Interrupted, SignalPolicy
from drivetrain.signals import (
    SignalAction,
    SignalWatch,
    check_saves,
    policy_of,
    requeue,
    requeue_command,
)


# The policy
def test_without_a_word_sigint_and_sigterm_save_and_nothing_else_is_touched():
    assert SignalPolicy.of(None).table == {
        signal.SIGINT: SignalAction.SAVE,
        signal.SIGTERM: SignalAction.SAVE,
    }


def test_an_action_alone_is_for_sigint_and_sigterm():
    table = SignalPolicy.of("stop").table
    assert set(table.values()) == {SignalAction.STOP}
    assert set(table) == {signal.SIGINT, signal.SIGTERM}


def test_a_signal_that_is_left_alone_has_no_handler():
    policy = SignalPolicy({"SIGINT": "leave", "SIGUSR2": "save"})
    assert set(policy.table) == {signal.SIGTERM, signal.SIGUSR2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"actions": {"SIGKILL": "save"}}, "SIGKILL"),
        ({"actions": {"SIGTERM": "rest"}}, "rest"),
        ({"deadline": 0}, "deadline=0"),
        ({"deadline": -1.0}, "deadline=-1.0"),
        ({"deadline": "soon"}, "'soon' is not a duration"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(given, words):
    with pytest.raises(ConfigurationError, match=words):
        SignalPolicy(**given)


def test_all_that_is_wrong_with_a_policy_is_told_at_once():
    with pytest.raises(ConfigurationError) as caught:
        SignalPolicy({"SIGKILL": "rest"}, deadline=-1)
    assert len(caught.value.problems) == 3


def test_what_is_no_policy_is_refused():
    with pytest.raises(ConfigurationError, match="signals=3"):
        SignalPolicy.of(3)


def test_a_deadline_may_be_a_duration():
    assert SignalPolicy(deadline=timedelta(minutes=1)).seconds == 60
    assert SignalPolicy(deadline=2.5).seconds == 2.5


def test_a_policy_travels_to_other_processes():
    policy = SignalPolicy({"SIGUSR1": "requeue"}, deadline=3, requeue_command=("true",))
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_has_the_exit_code_of_its_signal(number, code):
    error = Interrupted(number)
    assert isinstance(error, SystemExit)
    assert error.code == code
    assert error.signal is number
    assert pickle.loads(pickle.dumps(error)).code == code


# Handlers
def test_a_signal_only_sets_a_flag_and_tells_who_listens():
    told = []
    with SignalWatch(SignalPolicy()) as watch:
        watch.listen(told.append)
        signal.raise_signal(signal.SIGTERM)
        assert watch.number == signal.SIGTERM
    assert told == [signal.SIGTERM]


def test_a_signal_that_came_before_anybody_listened_is_told_then():
    told = []
    with SignalWatch(SignalPolicy()) as watch:
        signal.raise_signal(signal.SIGTERM)
        watch.listen(told.append)
    assert told == [signal.SIGTERM]


def test_a_second_ctrl_c_means_now():
    with SignalWatch(SignalPolicy()) as watch:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert watch.number == signal.SIGINT


def test_a_second_sigterm_and_what_a_scheduler_sends_later_change_nothing():
    told = []
    with SignalWatch(SignalPolicy({"SIGUSR1": "save"})) as watch:
        watch.listen(told.append)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert watch.number == signal.SIGUSR1
    assert told == [signal.SIGUSR1]


def test_an_ignored_signal_does_nothing():
    told = []
    with SignalWatch(SignalPolicy({"SIGTERM": "ignore"})) as watch:
        watch.listen(told.append)
        signal.raise_signal(signal.SIGTERM)
        assert watch.number == 0
    assert told == []


def test_handlers_are_those_from_before_also_after_an_error():
    def own(_number, _frame):
        """The user's handler."""

    def fail():
        with SignalWatch(SignalPolicy()):
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
    before, found = signal.getsignal(signal.SIGINT), []

    def main():
        with SignalWatch(SignalPolicy()):
            found.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=main)
    thread.start()
    thread.join(timeout=30)
    assert found == [True]


# The deadline
_LATE = """
import sys, time, signal
from drivetrain import signals
signals.LAST_SECONDS = 0.5
with signals.SignalWatch(signals.SignalPolicy(deadline=0.3)):
    print("ready", flush=True)
    try:
        {wait}
    finally:
        print("torn down", flush=True)
"""


def _run_past_the_deadline(wait: str) -> subprocess.CompletedProcess[str]:
    code = _LATE.format(wait=wait)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_at_the_deadline_the_run_is_cut_off_shows_where_it_was_and_tears_down():
    done = _run_past_the_deadline("signal.raise_signal(signal.SIGTERM); time.sleep(50)")
    assert done.returncode == 143, done.stderr
    assert done.stdout.split() == ["ready", "torn", "down"]
    assert "SIGTERM came 0.3 s ago" in done.stderr
    assert "Thread" in done.stderr


def test_code_that_never_comes_back_is_ended_by_force():
    done = _run_past_the_deadline(
        "signal.raise_signal(signal.SIGTERM); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}); time.sleep(50)"
    )
    assert done.returncode == 143, done.stderr
    assert done.stdout.split() == ["ready"]
    assert "ends by force" in done.stderr


# Requeue
def test_nobody_to_requeue_is_an_error_when_the_policy_is_given():
    with pytest.raises(ConfigurationError, match="belongs to no batch job"):
        policy_of(SignalPolicy({"SIGUSR1": "requeue"}), {})


def test_a_command_that_is_not_here_is_an_error_before_anything_starts():
    policy = SignalPolicy({"SIGUSR1": "requeue"}, requeue_command=("no-such-command", "7"))
    with pytest.raises(ConfigurationError, match="there is no 'no-such-command' here"):
        requeue_command(policy, {})


def test_a_policy_that_requeues_needs_a_checkpoint_to_go_on_from():
    policy = SignalPolicy({"SIGUSR1": "requeue"}, requeue_command=("true",))
    with pytest.raises(ConfigurationError, match="no callback saves"):
        check_saves(policy, [Callback()])
    check_saves(SignalPolicy(), [])


def test_whether_the_scheduler_agreed_is_said(caplog):
    agreed = SignalPolicy(requeue_command=(sys.executable, "-c", ""))
    assert requeue(agreed, {})
    refused = SignalPolicy(
        requeue_command=(sys.executable, "-c", "raise SystemExit('no such job')")
    )
    assert not requeue(refused, {})
    assert "no such job" in caplog.text
