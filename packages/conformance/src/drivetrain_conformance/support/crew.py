"""Processes of one world, started once for all tests of that size."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import time
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_conformance.support.ranks import Order, make_rank, serve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

#: Seconds that a case may take, starting the processes included: each of them imports torch.
START_S = 180.0
CASE_S = 90.0
STOP_S = 10.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Crew:
    """The processes of one world.

    Args:
        backend: The backend under test, as on the command line.
        strategy: The strategy under test, as on the command line.
        devices: Index of the device of each rank.
    """

    def __init__(self, backend: str, strategy: str | None, devices: tuple[int, ...]) -> None:
        self._order = Order(backend, strategy, devices, free_port())
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        for rank in range(len(devices)):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(there, self._order, rank), name=f"rank-{rank}", daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        self._fresh = True

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self._connections)

    @property
    def broken(self) -> bool:
        """Whether a process has ended."""
        return not all(process.is_alive() for process in self._processes)

    def run(
        self,
        case: str,
        rule: str,
        *,
        dying: Sequence[int] = (),
        seconds: float = CASE_S,
        **arguments: Any,
    ) -> list[Any]:
        """Run a case in every process; returns what each answered, by rank.

        Fails the test if one raises, ends, or does not answer in time.

        Args:
            case: ``module:function``, called with a ``Rank`` and the arguments.
            rule: The rule in words, with its number.
            dying: Ranks that the case ends; they answer None.
            seconds: How long the case may take.
            arguments: Of the function.
        """
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((case, arguments)))
        deadline = time.monotonic() + seconds + (START_S if self._fresh else 0.0)
        self._fresh = False
        answers: dict[int, Any] = dict.fromkeys(dying)
        while len(answers) < self.size:
            waiting = [rank for rank in range(self.size) if rank not in answers]
            left = max(0.0, deadline - time.monotonic())
            ready = wait([self._connections[rank] for rank in waiting], left)
            if not ready:
                self.stop()
                pytest.fail(f"{rule}; these ranks did not answer in {seconds:.0f} s: {waiting}")
            for rank in waiting:
                if self._connections[rank] in ready:
                    answers[rank] = self._receive(rank, rule)
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int, rule: str) -> Any:
        try:
            good, value = pickle.loads(self._connections[rank].recv_bytes())  # noqa: S301 - ours
        except (EOFError, ConnectionError):
            self._processes[rank].join(STOP_S)
            code = self._processes[rank].exitcode
            self.stop()
            pytest.fail(f"{rule}; the process of rank {rank} ended with code {code}")
        if not good:
            self.stop()  # the others may wait for it
            pytest.fail(f"{rule}; rank {rank} of {self.size} raised:\n{value}")
        return value

    def stop(self) -> None:
        """End all processes. Safe to call twice."""
        if not self.broken:
            for connection in self._connections:
                with suppress(OSError):  # it may be ending just now
                    connection.send_bytes(pickle.dumps((None, {})))
            deadline = time.monotonic() + STOP_S
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(STOP_S)


class SteadyCrew:
    """A crew for a package's own tests: started when it is needed, and anew after a failed case.

    Args:
        backend: The backend, by name.
        devices: Index of the device of each rank.
        variables: What the environment of the processes holds besides.
    """

    def __init__(
        self, backend: str, devices: tuple[int, ...], variables: Mapping[str, str] | None = None
    ) -> None:
        self._backend = backend
        self._devices = devices
        self._variables = dict(variables or {})
        self._crew: Crew | None = None

    def run(self, case: str, rule: str, **arguments: Any) -> list[Any]:
        """Run a case; see ``Crew.run``."""
        if self._crew is None or self._crew.broken:
            with pytest.MonkeyPatch.context() as patched:
                for name, value in self._variables.items():
                    patched.setenv(name, value)
                self._crew = Crew(self._backend, None, self._devices)
        return self._crew.run(case, rule, **arguments)

    def stop(self) -> None:
        """End all processes. Safe to call twice."""
        if self._crew is not None:
            self._crew.stop()


class LonelyCrew:
    """A world of one, in this process; otherwise as ``Crew``."""

    size = 1
    broken = False

    def __init__(self, backend: str, strategy: str | None, devices: tuple[int, ...]) -> None:
        self._rank = make_rank(Order(backend, strategy, devices, 0), 0)

    def run(self, case: str, rule: str, **arguments: Any) -> list[Any]:
        """Run a case; see ``Crew.run``."""
        try:
            return [self._rank.run(case, arguments)]
        except Exception as error:  # noqa: BLE001 - the test fails with it
            pytest.fail(f"{rule}; in a world of one it raised {type(error).__name__}: {error}")

    def stop(self) -> None:
        """Release the device."""
        self._rank.disconnect()
        self._rank.accelerator.close()
