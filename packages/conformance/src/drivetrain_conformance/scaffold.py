"""A new backend package, rendered from ``template/``. ``docs/write-a-backend.md`` goes on from it.

Rendering needs copier, an extra of this distribution; nothing else here does.
"""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_interfaces import CONTRACT, ConfigurationError, DrivetrainError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
#: What may be answered besides the name, and what an answer looks like. The defaults are in
#: ``template/copier.yml``.
QUESTIONS = {
    "distribution": re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*"),
    "device_type": re.compile(r"[A-Za-z_][A-Za-z0-9_]*"),
    "extension": re.compile(r"[A-Za-z_][A-Za-z0-9_]*"),
    "author": re.compile(r".+"),
}


def new(name: str, into: Path, answers: Mapping[str, str] | None = None) -> Path:
    """Render a backend package.

    Args:
        name: What users will write in ``accelerator=``.
        into: The folder that the package's own folder is made in.
        answers: Answers to questions of the template, where the default does not do.

    Returns:
        The package's folder.

    Raises:
        ConfigurationError: The name cannot be one, an answer has no question, or the folder is
            there already.
        NotFoundError: Copier is not installed.
    """
    answers = dict(answers or {})
    _check_name(name)
    _check_answers(answers)
    distribution = answers.setdefault("distribution", f"drivetrain-{name.replace('_', '-')}")
    folder = into / distribution
    if folder.exists():
        raise ConfigurationError(
            f"A backend {name!r} was asked for, and {str(folder)!r} is there already.",
            "Choose another folder or name, or remove it.",
        )
    _render(folder, {**answers, **_versions(), "name": name})
    return folder


def _render(folder: Path, data: Mapping[str, str]) -> None:
    try:
        import copier
    except ModuleNotFoundError as error:
        raise NotFoundError(
            "A new backend was asked for, and copier, which renders the template, is not "
            f"installed ({error.name} is missing).",
            'Install it with pip install "drivetrain-conformance[scaffold]".',
        ) from error
    with resources.as_file(resources.files("drivetrain_conformance") / "template") as template:
        copier.run_copy(str(template), folder, data=dict(data), defaults=True, quiet=True)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigurationError(
            f"A backend named {name!r} was asked for, which cannot be part of a module's name.",
            "Use lower-case letters, digits and single underscores, such as 'acme'.",
        )


def _check_answers(answers: Mapping[str, str]) -> None:
    for question, answer in answers.items():
        if question not in QUESTIONS:
            raise ConfigurationError(
                f"An answer to {question!r} was given, and the template asks for "
                f"{', '.join(sorted(QUESTIONS))}.",
                "Leave it out.",
            )
        if not QUESTIONS[question].fullmatch(answer):
            raise ConfigurationError(
                f"{question}={answer!r} was given, which cannot be part of a package.",
                "Use letters and digits, and hyphens in the distribution's name alone.",
            )


def _versions() -> dict[str, str]:
    """The contract that a new backend is written for, and the releases that have it.

    Before 1.0 only the same minor is served, later every higher one of the same major. Where the
    kit itself is not released yet, neither is what the new package needs.
    """
    ceiling = f"0.{CONTRACT.minor + 1}" if CONTRACT.major == 0 else str(CONTRACT.major + 1)
    installed = metadata.version("drivetrain-interfaces")
    return {
        "contract": str(CONTRACT),
        "contract_literal": f"{CONTRACT.major}, {CONTRACT.minor}",
        "floor": f"{CONTRACT}.0.dev0" if "dev" in installed else str(CONTRACT),
        "ceiling": ceiling,
    }


def main(words: Sequence[str] | None = None, prog: str = "drivetrain new-backend") -> int:
    """The command line of ``new``.

    Args:
        words: What follows the command; None means the arguments of this process.
        prog: How the command is called, for its help.

    Returns:
        The exit code: 0, or 2 with a message when it cannot be done.
    """
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, description="Render the package of a new backend."
    )
    parser.add_argument("name", help="what users will write in accelerator=, such as acme")
    parser.add_argument(
        "--into", type=Path, default=Path(), metavar="DIR", help="where (default: here)"
    )
    for question, text in (
        ("distribution", "name to publish under (default: drivetrain-NAME)"),
        ("device_type", "type of the torch.device (default: NAME)"),
        ("extension", "module that brings the device to torch (default: torch_NAME)"),
        ("author", "who owns the package (default: NAME)"),
    ):
        option = f"--{question.replace('_', '-')}"
        parser.add_argument(option, dest=question, metavar="TEXT", help=text)
    options = vars(parser.parse_args(words))
    answers = {question: options[question] for question in QUESTIONS if options[question]}
    try:
        folder = new(options["name"], options["into"], answers)
    except DrivetrainError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return 2
    sys.stdout.write(f"{folder} is ready. Its README.md says what to do next.\n")
    return 0
