"""A process for each chip of this machine, started by ``torch_xla.launch``."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces import ClusterError, ProcessFailedError
from drivetrain_toolkit.failures import (
    DIRECTORY,
    RunDirectory,
    is_stop,
    process_failed,
    reported,
)
from drivetrain_toolkit.launchers import plans
from drivetrain_toolkit.launchers.pickles import pickled, pickled_result, unpickled
from drivetrain_toolkit.launchers.ranks import follow_launcher

from drivetrain_xla.probing import look
from drivetrain_xla.runtime import is_open, load_library

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from drivetrain_interfaces import LaunchPlan, LaunchRequest, World
    from drivetrain_toolkit.processes import PortReservation

_RESULT: Final = "result.pickle"


class XlaLauncher:
    """Starts as many processes as there are chips. ``main`` travels by pickle.

    Torch_xla's runtime for CPUs is served by one process, however many devices it has.
    """

    name = "torch_xla"
    interactive = False

    def __init__(self) -> None:
        self._reservation: PortReservation | None = None

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """The ranks of this machine.

        Raises:
            ClusterError: Another number of processes was asked for than there are devices, or this
                process is a rank already.
        """
        plans.check_request(request, self.name)
        plans.refuse_inside_a_rank(self.name)
        found = look(os.environ).devices
        on_cpu = os.environ.get("PJRT_DEVICE") == "CPU"
        if request.local_size != found or (on_cpu and found > 1):
            where = (
                "a TPU machine" if not on_cpu else "torch_xla's runtime for CPUs, in one process"
            )
            raise ClusterError(
                f"The {self.name!r} launcher was asked for {plans.describe(request)}, and here it "
                f"starts one on each of {found} devices of {where}.",
                "Use launcher='spawn'." if on_cpu else "Use all, or set TPU_VISIBLE_CHIPS.",
            )
        self._reservation = plans.reserve(request)
        return plans.make_plan(request, self.name, reservation=self._reservation)

    def launch(self, main: Callable[[World], Any], plan: LaunchPlan) -> Any:
        """Run ``main`` in every process of the plan; returns what rank 0 returned.

        Raises:
            ClusterError: This process has opened the devices already.
            ProcessFailedError: A rank failed. All processes have ended.
            UserCodeError: ``main`` or its result cannot be pickled.
        """
        if is_open():
            raise ClusterError(
                f"The {self.name!r} launcher was to start processes from one that has opened the "
                "XLA devices, which they could then not have.",
                "Launch before anything else is done with XLA devices.",
            )
        load_library()
        task = pickled(main, self.name)
        directory = RunDirectory.create()
        try:
            return self._launch(task, plan, directory)
        finally:
            directory.remove()
            if self._reservation is not None:
                self._reservation.close()

    def _launch(self, task: bytes, plan: LaunchPlan, directory: RunDirectory) -> Any:
        import torch_xla

        try:
            torch_xla.launch(_run_rank, args=(task, plan.worlds, directory.path, os.getpid()))
        except Exception as error:
            size = plan.worlds[0].size
            states = [directory.read(world.rank) for world in plan.worlds]
            failures = [state.failure for state in states if state.failure is not None]
            if failures:
                raise process_failed(failures, size) from error
            raise ProcessFailedError(
                f"A run of {size} processes was ended, because one of them ended without a word "
                f"({type(error).__name__}: {error}).",
                "Look at what it printed before it ended.",
            ) from error
        result = Path(directory.path, _RESULT)
        if not result.exists():
            return None  # rank 0 is on another machine
        return unpickled(result.read_bytes(), "The result of rank 0")


def _run_rank(
    _ordinal: int, task: bytes, worlds: tuple[World, ...], path: str, parent: int
) -> None:
    """What torch_xla calls in each process: become the rank, call ``main``, and report."""
    world = worlds[int(os.environ["PJRT_LOCAL_PROCESS_RANK"])]
    directory = RunDirectory(path)
    os.environ.update({**plans.place(world, XlaLauncher.name), DIRECTORY: path})

    def main(place: World) -> bytes:
        _refuse_threads()
        follow_launcher(parent, directory)
        return pickled_result(unpickled(task, "main")(place))

    try:
        result = reported(main, world, directory)
    except BaseException as error:  # noqa: BLE001 - reported, and the exit code says the rest
        _end(error)
    if world.is_main:
        Path(path, _RESULT).write_bytes(result)


def _refuse_threads() -> None:
    """Stop where torch_xla runs several ranks as threads of one process."""
    import torch_xla.runtime as xr

    if xr.addressable_runtime_device_count() > 1:
        raise ClusterError(
            f"This process has {xr.addressable_runtime_device_count()} XLA devices, for each of "
            "which torch_xla.launch runs a thread, and ranks need a process each.",
            "Use strategy='spmd', which drives all devices from one process.",
        )


def _end(error: BaseException) -> NoReturn:
    """End this process at once: torch_xla then ends the others, which might wait for it."""
    if not is_stop(error):
        traceback.print_exception(error)
    code = getattr(error, "code", 1)
    os._exit(code if isinstance(code, int) else 1)
