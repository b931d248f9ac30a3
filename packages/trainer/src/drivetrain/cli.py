"""The ``drivetrain`` command: train from a file, show a plan, look at machine and checkpoints.

Only what a command needs is imported: ``plan``, ``doctor`` and ``--version`` load no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import (
    ConfigurationError,
    DrivetrainError,
    NonFiniteLossError,
    NotFoundError,
    ProcessFailedError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jsonargparse import ArgumentParser, Namespace

_RUNS: Final = {
    "fit": "train a model",
    "validate": "evaluate a model on its validation data",
    "test": "evaluate a model on its test data",
    "predict": "run a model on its prediction data",
}
_LOOKS: Final = {
    "plan": "show what a run would be, and why",
    "submit": "write the job file for a batch system, and submit it with --go",
    "doctor": "show what is installed, what the machine has, and what to install",
    "checkpoint": "verify, inspect, convert, consolidate, diff or prune checkpoints",
    "new-backend": "write the package of a new backend",
}
#: Exit codes: wrong settings, a run that failed, and a run that Ctrl-C ended.
_WRONG, _FAILED, _INTERRUPTED = 2, 1, 130
#: Errors that come from the run itself; all others are settings that the user can correct.
_RUN_ERRORS: Final = (NonFiniteLossError, ProcessFailedError, StorageError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``drivetrain``; None means those of this process.

    Returns:
        The exit code: 0, 2 for settings that cannot be met, 1 for a run that failed, and 128 plus
        the number of the signal that stopped a run.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        **{name: _runner(name) for name in _RUNS},
        "plan": _plan,
        "submit": _submit,
        "doctor": _doctor,
        "checkpoint": _checkpoint,
        "new-backend": _new_backend,
        "--version": _version,
        "--help": _help,
        "-h": _help,
    }
    if command not in commands:
        _tell(f"drivetrain: there is no command {command!r}.\n{_usage()}")
        return _WRONG
    try:
        return commands[command](words[1:])
    except DrivetrainError as error:
        _tell(f"drivetrain {command}: {error}")
        return _FAILED if isinstance(error, _RUN_ERRORS) else _WRONG
    except KeyboardInterrupt:
        return _INTERRUPTED


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _usage() -> str:
    lines = ["usage: drivetrain COMMAND [options]", "", "commands:"]
    lines += [f"  {name:12} {text}" for name, text in {**_RUNS, **_LOOKS}.items()]
    lines += ["", "options:", "  --version  show the version", "  --help     show this text"]
    return "\n".join(lines)


def _help(_words: Sequence[str]) -> int:
    _say(f"{_usage()}\n\n'drivetrain COMMAND --help' shows the options of a command.")
    return 0


def _version(_words: Sequence[str]) -> int:
    from importlib import metadata

    _say(f"drivetrain {metadata.version('drivetrain')}")
    return 0


# Looking


def _plan(words: Sequence[str]) -> int:
    from jsonargparse import ArgumentParser

    from drivetrain.plan import Request
    from drivetrain.resolve import resolve
    from drivetrain.survey import survey

    parser = ArgumentParser(
        prog="drivetrain plan", allow_abbrev=False, description=f"{_LOOKS['plan']}."
    )
    for name, text in (
        ("accelerator", "name of a backend, or auto"),
        ("strategy", "name of a strategy, or auto"),
        ("launcher", "name of a launcher, or auto"),
        ("cluster_environment", "name of a cluster environment, none, or auto"),
    ):
        parser.add_argument(f"--{name}", type=str, default="auto", help=text)
    number_or_name = int | str
    parser.add_argument(
        "--devices", type=number_or_name, default="auto", help="how many, or which (0,1), or auto"
    )
    parser.add_argument(
        "--precision", type=number_or_name | None, default=None, help="such as bf16-mixed"
    )
    parser.add_argument(
        "--gpus", type=number_or_name | None, default=None, help="devices that are not the host"
    )
    parser.add_argument("--num_nodes", type=int, default=1, help="how many machines")
    parser.add_argument("--sync_batchnorm", type=bool, default=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = vars(parser.parse_args(list(words)))
    as_json = options.pop("json")
    request = Request(**options)
    plan = resolve(request, survey(request)).plan
    _say(plan.to_json() if as_json else plan.explain())
    return 0


def _doctor(words: Sequence[str]) -> int:
    from jsonargparse import ArgumentParser

    from drivetrain.doctor import examine

    parser = ArgumentParser(
        prog="drivetrain doctor", allow_abbrev=False, description=f"{_LOOKS['doctor']}."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(words))
    report = examine()
    _say(report.to_json() if options.json else report.render())
    return 0


def _submit(words: Sequence[str]) -> int:
    from drivetrain.submit import submit

    return submit(words, _say)


def _checkpoint(words: Sequence[str]) -> int:
    from drivetrain.checkpoint_cli import run

    return run(words)


def _new_backend(words: Sequence[str]) -> int:
    try:
        scaffold = import_module("drivetrain_conformance.scaffold")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("drivetrain_conformance"):
            raise  # it is installed, and something that it needs is not
        raise NotFoundError(
            "A new backend was asked for, and its template comes with drivetrain-conformance, "
            "which is not installed.",
            'Install it with pip install "drivetrain-conformance[scaffold]".',
        ) from error
    code: int = scaffold.main(words)
    return code


# Running


def _runner(command: str) -> Callable[[Sequence[str]], int]:
    def run(words: Sequence[str]) -> int:
        from drivetrain import Trainer, seed_everything

        _import_from_here()
        parser = _run_parser(command)
        settings = parser.parse_args(list(words))
        if settings.seed_everything is not None:
            seed_everything(settings.seed_everything)
        trainer = Trainer(**_built(settings.pop("trainer").as_dict()))
        made = _instantiate(parser, settings)
        action: Any = getattr(trainer, command)
        result = action(made.model, datamodule=made.get("data"), ckpt_path=settings.ckpt_path)
        world = trainer.runtime.parts.world
        if world is None or world.is_main:
            _report(command, result)
        return 0

    return run


def _instantiate(parser: ArgumentParser, settings: Namespace) -> Namespace:
    # The first is newer; the second warns where both exist, and is to go.
    newer = hasattr(parser, "instantiate")
    made: Namespace = (parser.instantiate if newer else parser.instantiate_classes)(settings)
    return made


def _built(value: Any) -> Any:
    """A setting with every ``class_path`` in it made into the object that it describes.

    The trainer's arguments take objects of many kinds, so that their types say nothing here.

    Raises:
        ConfigurationError: There is no such class, or it does not take these arguments.
    """
    if isinstance(value, dict) and "class_path" in value:
        return _made(value["class_path"], _built(value.get("init_args") or {}))
    if isinstance(value, dict):
        return {key: _built(item) for key, item in value.items()}
    return [_built(item) for item in value] if isinstance(value, list) else value


def _made(path: str, arguments: dict[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, DrivetrainError):
            raise
        raise ConfigurationError(
            f"class_path={path!r} with {arguments} was asked for, and making it raised "
            f"{type(error).__name__}: {error}.",
            "Correct the name or the arguments.",
        ) from error


def _run_parser(command: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from drivetrain import DataModule, Module, Trainer

    parser = ArgumentParser(
        prog=f"drivetrain {command}", allow_abbrev=False, description=f"{_RUNS[command]}."
    )
    parser.add_argument("--config", action="config", help="a file with the settings")
    parser.add_argument(
        "--seed_everything", type=int | None, default=None, help="seed of every generator"
    )
    parser.add_argument(
        "--ckpt_path", type=str | None, default=None, help="the checkpoint to go on from"
    )
    parser.add_class_arguments(Trainer, "trainer")
    parser.add_subclass_arguments(Module, "model", required=True)
    parser.add_subclass_arguments(DataModule, "data", required=False)
    return parser


def _import_from_here() -> None:
    """Let ``class_path`` name modules in the working directory, as scripts there can import."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def _report(command: str, result: Any) -> None:
    if command in {"validate", "test"}:
        for name, value in result.items():
            _say(f"{name} {value:g}")
    elif command == "predict":
        _say(f"{len(result)} batches were predicted; a callback can write them.")
