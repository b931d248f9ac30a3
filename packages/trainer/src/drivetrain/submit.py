"""``drivetrain submit``: a job file for a batch system, shown, and submitted with ``--go``.

Who the batch systems are is what is installed: the entry points ``drivetrain.submitters``.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivetrain_interfaces import JobRequest, Submitter
from drivetrain_interfaces.discovery import SUBMITTERS, load, registrations
from drivetrain_interfaces.errors import (
    ConfigurationError,
    NotFoundError,
    ProcessFailedError,
    StorageError,
    listed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain_interfaces import JobFile
    from jsonargparse import ArgumentParser, Namespace

_COMMAND: Final = "--"


def submit(words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run the command.

    Args:
        words: ``MANAGER [options] -- COMMAND``.
        say: Prints a text.

    Returns:
        The exit code.

    Raises:
        NotFoundError: Nobody writes files for that manager, or its program is not installed.
        ConfigurationError: A job that cannot be, or another file of that name.
        StorageError: The file cannot be written.
        ProcessFailedError: The manager refused the job.
    """
    words = list(words)
    cut = words.index(_COMMAND) if _COMMAND in words else len(words)
    options, command = words[:cut], words[cut + 1 :]
    parser = _parser()
    settings = parser.parse_args(options)
    submitter = _submitter(settings.manager)
    job = JobRequest(
        tuple(command),
        name=settings.name,
        nodes=settings.nodes,
        processes=settings.processes,
        devices=settings.devices,
        cpus=settings.cpus,
        memory=settings.memory,
        time=settings.time,
        setup=tuple(settings.setup),
        options=tuple(settings.option),
    )
    file = submitter.write(job)
    path = settings.file or f"{settings.name}{file.suffix}"
    _write(path, file, settings)
    say(f"# {path}\n{file.text}")
    submitted = submitter.command(path)
    if not settings.go:
        say(f"Nothing was submitted. Add --go, or run: {shlex.join(submitted)}")
        return 0
    _run(submitted, settings.manager)
    return 0


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="drivetrain submit",
        allow_abbrev=False,
        description="write the job file for a batch system, show it, and submit it with --go.",
    )
    parser.add_argument(
        "manager", type=str, help=f"one of: {listed(registrations(SUBMITTERS))}; then -- COMMAND"
    )
    for name, kind, default, text in (
        ("name", str, "drivetrain", "what the job is called"),
        ("nodes", int, 1, "number of machines"),
        ("processes", int, 1, "processes on each machine"),
        ("devices", int, 0, "accelerator devices on each machine"),
        ("cpus", int, 0, "cores for each process"),
        ("memory", str, "", "memory of each machine, as the manager writes it"),
        ("time", str, "", "longest time, HH:MM:SS"),
        ("file", str, "", "where the file goes; by default named after the job"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name, text in (
        ("option", "a further option for the manager, such as --partition=gpu; again for more"),
        ("setup", "a line of shell that runs first, such as 'module load x'; again for more"),
    ):
        parser.add_argument(f"--{name}", type=str, action="append", default=[], help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    parser.add_argument("--go", action="store_true", help="submit it")
    return parser


def _submitter(name: str) -> Submitter:
    return load(
        SUBMITTERS,
        name,
        Submitter,  # type: ignore[type-abstract]  # a protocol that isinstance knows
        what="batch system",
        package=None if registrations(SUBMITTERS) else "drivetrain-toolkit",
    )


def _write(path: str, file: JobFile, settings: Namespace) -> None:
    target = Path(path)
    try:
        if target.exists() and not settings.overwrite:
            if target.read_text(encoding="utf-8") == file.text:
                return
            raise ConfigurationError(
                f"The job was to be written to {path!r}, and that file is there and is different.",
                "Look at it; then add --overwrite, or name another with --file.",
            )
        target.write_text(file.text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"The job was to be written to {path!r}, and that raised {error}.",
            "Name another file with --file.",
        ) from error


def _run(command: tuple[str, ...], manager: str) -> None:
    try:
        done = subprocess.run(command, check=False)  # noqa: S603 - what was shown to the user
    except FileNotFoundError as error:
        raise NotFoundError(
            f"The job was to be submitted with {shlex.join(command)!r}, and there is no program "
            f"{command[0]!r} here.",
            f"Submit the file on a machine where {manager} is installed.",
        ) from error
    if done.returncode:
        raise ProcessFailedError(
            f"{shlex.join(command)!r} ended with exit code {done.returncode}; the job was not "
            "submitted.",
            "Correct what it said above.",
        )
