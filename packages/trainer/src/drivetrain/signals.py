"""What signals do to a run: a policy that users write, and handlers that only set a flag."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from drivetrain_interfaces import ConfigurationError, JobManager
from drivetrain_interfaces.discovery import MANAGERS, check, registrations, single

from drivetrain.durations import seconds_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from types import FrameType

    from typing_extensions import Self

    from drivetrain.callbacks.base import Callback

log = logging.getLogger("drivetrain")

#: From the deadline to the end by force, in seconds: what the user's teardown has.
LAST_SECONDS = 5.0
#: How often the deadline is looked at, in seconds.
_LOOK = 0.25
_COMMAND_SECONDS = 60.0
_ALLOWED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class SignalAction(str, Enum):
    """What a signal does. A run always stops at a boundary between two steps."""

    #: Stop, save nothing.
    STOP = "stop"
    #: Stop, and save if a ``ModelCheckpoint`` is there.
    SAVE = "save"
    #: Stop and save; then ask the batch scheduler to run this job again.
    REQUEUE = "requeue"
    #: Go on as if nothing had come.
    IGNORE = "ignore"
    #: Leave the signal to whoever handled it before.
    LEAVE = "leave"


#: Where ranks were asked for different things, the last of these wins.
_ORDER = (SignalAction.STOP, SignalAction.SAVE, SignalAction.REQUEUE)


@dataclass(frozen=True)
class SignalPolicy:
    """What the signals of a run do.

    Example: ``SignalPolicy({"SIGUSR1": "requeue", "SIGINT": "stop"}, deadline=25)``.

    Args:
        actions: An action by name for each signal; allowed are SIGINT, SIGTERM, SIGHUP, SIGUSR1,
            SIGUSR2 and SIGXCPU. SIGINT and SIGTERM save unless they are named here; the others
            are left alone.
        deadline: Seconds from a signal to the end of the process, or a duration. If no boundary
            comes in time the run is cut off: stacks are printed and teardown hooks run. None waits
            for the boundary.
        requeue_command: The words of the command that makes the job run again. None takes it from
            the batch scheduler that is found.

    Raises:
        ConfigurationError: A signal or an action that is not one of these; a deadline that is
            none; nobody to requeue.
    """

    actions: Mapping[str, str | SignalAction] = field(default_factory=dict)
    deadline: float | timedelta | None = None
    requeue_command: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        for name, action in self.actions.items():
            if name not in _ALLOWED or not hasattr(signal, name):
                problems.append((f"signals names {name!r}.", f"Use one of {', '.join(_ALLOWED)}."))
            if action not in {each.value for each in SignalAction}:
                choices = ", ".join(each.value for each in SignalAction)
                problems.append((f"signals: {name}={action!r} is no action.", f"Use {choices}."))
        if self.deadline is not None and not self._seconds(problems):
            problems.append(
                (f"signals: deadline={self.deadline!r}.", "Give seconds, more than 0, or None.")
            )
        if problems:
            raise ConfigurationError.conflicts(problems)

    def _seconds(self, problems: list[tuple[str, str]]) -> bool:
        try:
            return (self.seconds or 0.0) > 0
        except ConfigurationError as error:
            problems.extend(error.problems)
            return True

    @property
    def seconds(self) -> float | None:
        """The deadline in seconds."""
        if self.deadline is None or isinstance(self.deadline, (int, float)):
            return self.deadline
        return seconds_of(self.deadline)

    @property
    def table(self) -> dict[signal.Signals, SignalAction]:
        """The action of each signal that this policy handles."""
        asked = {"SIGINT": "save", "SIGTERM": "save", **self.actions}
        found = {signal.Signals[name]: SignalAction(action) for name, action in asked.items()}
        return {number: each for number, each in found.items() if each is not SignalAction.LEAVE}

    def action(self, number: int) -> SignalAction:
        """What this signal does; 0 stands for a stop without one, as by ``max_time``."""
        return self.table[signal.Signals(number)] if number else SignalAction.SAVE

    def strongest(self, numbers: set[int]) -> int:
        """The one of several signals that decides, so that all ranks do the same."""
        return max(numbers, key=lambda each: (each > 0, _ORDER.index(self.action(each)), -each))

    @property
    def requeues(self) -> bool:
        """Whether any signal asks the scheduler to run the job again."""
        return SignalAction.REQUEUE in self.table.values()

    @classmethod
    def of(cls, given: Any) -> SignalPolicy:
        """The policy that the user means: one, its actions, None, or one for SIGINT and SIGTERM.

        Raises:
            ConfigurationError: It is none of these.
        """
        if given is None:
            return cls()
        if isinstance(given, SignalPolicy):
            return given
        if isinstance(given, (str, SignalAction)):
            return cls({"SIGINT": given, "SIGTERM": given})
        if isinstance(given, Mapping):
            return cls(given)
        raise ConfigurationError(
            f"signals={given!r} was asked for.",
            "Give a SignalPolicy, actions by signal, or one action for SIGINT and SIGTERM.",
        )


def policy_of(given: Any, env: Mapping[str, str]) -> SignalPolicy:
    """The policy that the user means, once it is known that it can be met.

    Raises:
        ConfigurationError: It is none, or asks to requeue where nobody can.
    """
    policy = SignalPolicy.of(given)
    if policy.requeues:
        requeue_command(policy, env)
    return policy


def check_saves(policy: SignalPolicy, callbacks: Sequence[Callback]) -> None:
    """A job that runs again without a checkpoint begins again. Raises ``ConfigurationError``."""
    if policy.requeues and not any(each.saves_checkpoints for each in callbacks):
        raise ConfigurationError(
            "signals asks to requeue the job, and no callback saves a checkpoint to go on from.",
            "Add a ModelCheckpoint, or set default_root_dir.",
        )


def requeue_command(policy: SignalPolicy, env: Mapping[str, str]) -> tuple[str, ...]:
    """The command that makes this job run again.

    Raises:
        ConfigurationError: No scheduler is found, or its command is not installed here.
    """
    command, who = policy.requeue_command, "requeue_command"
    if command is None:
        for name, claims in registrations(MANAGERS).items():
            manager = check(single(MANAGERS, name, claims), JobManager, "job manager")  # type: ignore[type-abstract]  # a runtime-checkable protocol
            if manager.detect(env):
                command, who = manager.requeue(env), name
    if not command:
        raise ConfigurationError(
            "signals asks to requeue the job, and this process belongs to no batch job of "
            f"{', '.join(registrations(MANAGERS)) or 'an installed manager'}.",
            "Use 'save' outside a batch job, or give requeue_command.",
        )
    if shutil.which(command[0]) is None:
        raise ConfigurationError(
            f"signals asks to requeue the job by {' '.join(command)!r} ({who}), and there is no "
            f"{command[0]!r} here.",
            "Make the command reachable, as inside a container, or use 'save'.",
        )
    return command


def requeue(policy: SignalPolicy, env: Mapping[str, str]) -> bool:
    """Ask the scheduler to run this job again; whether it agreed. Says so either way."""
    command = requeue_command(policy, env)
    done = subprocess.run(  # noqa: S603 - the user asked for it, by name
        command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
    )
    said = (done.stderr or done.stdout).strip()
    if done.returncode:
        log.error("%s ended with code %d: %s", " ".join(command), done.returncode, said)
        return False
    log.warning("%s: the job runs again from its checkpoint.", " ".join(command))
    return True


def expect_the_end() -> None:
    """Let SIGTERM and SIGCONT pass: a scheduler sends both to a job that it runs again."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGCONT"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


class Interrupted(SystemExit):
    """A run that a signal ended cleanly at a step boundary. Its exit code is 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return type(self), (int(self.signal),)


class SignalWatch:
    """The handlers of one run, from its first hook to its last. They only set a flag.

    Python runs handlers in the main thread; in another one there are none, and signals do what
    they did before.

    Attributes:
        number: The first signal that came, or 0.
    """

    def __init__(self, policy: SignalPolicy) -> None:
        self.policy = policy
        self.number = 0
        self._since = 0.0
        self._listener: Any = None
        self._raise: BaseException | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in self.policy.table}
            if self.policy.seconds is not None:
                self._thread = threading.Thread(
                    target=self._watch_the_clock, name="drivetrain-deadline", daemon=True
                )
                self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def listen(self, listener: Any) -> None:
        """Tell the number of the first signal, also where it has come already."""
        self._listener = listener
        if self.number:
            listener(self.number)

    def interrupt(self, error: BaseException) -> bool:
        """Raise an error in the main thread once that runs Python code; False if that cannot be.

        Called by another thread. It is a signal, since that also ends a sleep or a wait.
        """
        if not self._before:
            return False
        self._raise = error
        signal.pthread_kill(threading.main_thread().ident or 0, next(iter(self._before)))
        return True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._raise is not None:
            error, self._raise = self._raise, None
            raise error
        if self.policy.table[signal.Signals(number)] is SignalAction.IGNORE:
            return
        if self.number:
            if number == signal.SIGINT:
                # A second Ctrl-C means now: the person does not want to wait for the boundary.
                raise KeyboardInterrupt
            return  # managers send more than one; the first has decided
        self._since = time.monotonic()  # first, as the thread looks at the number
        self.number = number
        if self._listener is not None:
            self._listener(number)

    def _watch_the_clock(self) -> None:
        seconds = self.policy.seconds
        assert seconds is not None
        while not self._over.wait(_LOOK):
            if self.number and time.monotonic() - self._since >= seconds:
                break
        else:
            return
        name = signal.Signals(self.number).name
        sys.stderr.write(
            f"\n{name} came {seconds:g} s ago, and process {os.getpid()} has not come to an end. "
            "It is here:\n"
        )
        _print_stacks()
        self.interrupt(Interrupted(self.number))  # teardown hooks follow
        if not self._over.wait(LAST_SECONDS):
            sys.stderr.write(f"The process ends by force {LAST_SECONDS:g} s later.\n")
            sys.stderr.flush()
            os._exit(128 + self.number)


def _print_stacks() -> None:
    try:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    except (OSError, ValueError, AttributeError):  # a replaced stream without a descriptor
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    sys.stderr.flush()
