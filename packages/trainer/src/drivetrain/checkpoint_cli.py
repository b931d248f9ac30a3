"""``drivetrain checkpoint``: look after checkpoints from the command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from drivetrain_interfaces.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from drivetrain_interfaces.checkpoint import CheckpointFacts
    from jsonargparse import ArgumentParser, Namespace

ACTIONS: Final = {
    "verify": "tell whether checkpoints are complete and unchanged",
    "inspect": "show what is in a checkpoint",
    "convert": "write a checkpoint or file in another form, or import one of Lightning",
    "consolidate": "write a checkpoint again with its tensors in one file",
    "diff": "show where two checkpoints differ",
    "prune": "remove all but the newest checkpoints of a directory",
}
#: Exit code of an answer that is not good: damaged, or different.
NO: Final = 1
_WRONG: Final = 2
_SHOWN: Final = 40
_ENDINGS: Final = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}


def run(words: Sequence[str]) -> int:
    """Run ``drivetrain checkpoint`` with these words; returns the exit code."""
    action = words[0] if words else "--help"
    if action in {"--help", "-h"}:
        _say(_usage())
        return 0
    if action not in ACTIONS:
        sys.stderr.write(f"drivetrain checkpoint: there is no action {action!r}.\n{_usage()}\n")
        return _WRONG
    act: Callable[[Namespace], int] = globals()[f"_{action}"]
    return act(_parser(action).parse_args(list(words[1:])))


def _parser(action: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"drivetrain checkpoint {action}",
        allow_abbrev=False,
        description=f"{ACTIONS[action]}.",
    )
    if action == "verify":
        parser.add_argument(
            "paths", type=str, nargs="+", help="checkpoints, or directories of them"
        )
    elif action == "inspect":
        parser.add_argument("path", type=str, help="a checkpoint, or a single file")
        parser.add_argument("--all", action="store_true", help="show every value and tensor")
    elif action == "diff":
        parser.add_argument("first", type=str)
        parser.add_argument("second", type=str)
    elif action == "prune":
        parser.add_argument("directory", type=str)
        parser.add_argument("--keep", type=int, required=True, help="how many stay")
    else:
        parser.add_argument("source", type=str, help="what to read")
        parser.add_argument("target", type=str, help="where to write; nothing may be there")
    if action == "convert":
        parser.add_argument(
            "--form",
            type=str | None,
            default=None,
            help="directory, torch or safetensors; by default what the target's ending says",
        )
        parser.add_argument(
            "--model",
            type=str | None,
            default=None,
            help="class path of the module that a file of Lightning is for",
        )
        parser.add_argument(
            "--strict", type=bool, default=True, help="whether all names must be the model's"
        )
    if action in {"inspect", "diff"}:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify(options: Namespace) -> int:
    from drivetrain import checkpoints

    code = 0
    for path in _each(options.paths):
        problems = checkpoints.verify(path)
        _say(f"{path}: {'; '.join(problems) or 'complete and unchanged'}")
        code = NO if problems else code
    return code


def _each(paths: Iterable[str]) -> list[str]:
    """The checkpoints that are meant: those in a directory that is none itself.

    Raises:
        ConfigurationError: A directory holds none.
    """
    found = []
    for path in paths:
        inside = []
        if os.path.isdir(path) and not path.rstrip(os.sep).endswith(".ckpt"):
            names = sorted(os.listdir(path))
            inside = [name for name in names if name.endswith(".ckpt") and name[0] != "."]
            if not inside and not os.path.exists(os.path.join(path, "manifest.json")):
                raise ConfigurationError(
                    f"Checkpoints were to be verified in {path!r}, where there are none.",
                    "Give a checkpoint, or a directory that holds some.",
                )
        found += [os.path.join(path, name) for name in inside] or [path]
    return found


def _inspect(options: Namespace) -> int:
    from drivetrain import checkpoints

    facts = checkpoints.inspect(options.path)
    if options.json:
        _say(json.dumps(asdict(facts), indent=2, default=str))
    else:
        _show(facts, everything=options.all)
    return 0


def _show(facts: CheckpointFacts, *, everything: bool) -> None:
    names = ("form", "version", "contract", "producer", "created", "world_size")
    said = [(name, str(getattr(facts, name))) for name in names]
    about = [row for row in said if row[1] not in {"None", ""}]
    about += [(name, f"{size:,} bytes") for name, size in facts.files.items()]
    most = None if everything else _SHOWN
    _table(("", facts.path), about, None)
    _table(
        ("tensor", "type", "shape"),
        [
            (name, entry.dtype, " × ".join(map(str, entry.shape)) or "scalar")
            for name, entry in facts.tensors.items()
        ],
        most,
    )
    _table(
        ("value", ""),
        [
            (place, str(value) if everything else _short(value))
            for place, value in facts.values.items()
        ],
        most,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], most: int | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*names, show_edge=False)
    for row in rows[:most]:
        table.add_row(*map(Text, row))  # as it is: brackets in names are no markup
    # Wide enough for names where nobody looks, so that what goes into a file is not cut.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if most is not None and len(rows) > most:
        _say(f"… and {len(rows) - most} more: use --all")


def _diff(options: Namespace) -> int:
    from drivetrain import checkpoints

    found = checkpoints.diff(options.first, options.second)
    if options.json:
        _say(json.dumps([asdict(each) for each in found], indent=2, default=str))
    elif not found:
        _say("They hold the same.")
    else:
        rows = [(each.place, each.kind, each.detail) for each in found]
        _table(("place", "differs in", ""), rows, None)
    return NO if found else 0


def _convert(options: Namespace) -> int:
    from drivetrain import checkpoints

    form = options.form or _ENDINGS.get(os.path.splitext(options.target)[1], "directory")
    if checkpoints.is_lightning(options.source) and form == "directory":
        model = None if options.model is None else _model(options.model, options.source)
        left_out = checkpoints.import_lightning(
            options.source, options.target, model, strict=options.strict
        )
    elif options.model is not None:
        raise ConfigurationError(
            f"--model {options.model} was given, and {options.source!r} is not imported from "
            "Lightning to a directory.",
            "Leave it out.",
        )
    else:
        left_out = checkpoints.convert(options.source, options.target, form)
    _say_what_was_left_out(options.target, left_out)
    return 0


def _consolidate(options: Namespace) -> int:
    from drivetrain import checkpoints

    left_out = checkpoints.consolidate(options.source, options.target)
    _say_what_was_left_out(options.target, left_out)
    return 0


def _prune(options: Namespace) -> int:
    from drivetrain import checkpoints

    gone = checkpoints.prune(options.directory, options.keep)
    for path in gone:
        _say(f"removed {path}")
    _say(f"{len(gone)} removed.")
    return 0


def _model(path: str, source: str) -> Any:
    """The module of a class path, made with the hyperparameters of the file."""
    from drivetrain import lightning_file
    from drivetrain.module import Module, accepted
    from drivetrain.snapshot import default_io

    if "" not in sys.path:
        sys.path.insert(0, "")  # as scripts in the working directory can import
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--model {path} was given, and there is no such class ({error}).",
            "Give the class path of a Module, such as project.Classifier.",
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Module)):
        raise ConfigurationError(
            f"--model {path} was given, which is no drivetrain.Module.",
            "Give the class path of a Module, such as project.Classifier.",
        )
    held: Any = default_io(source)
    tree, _ = lightning_file.imported(held.read_file(source), None)
    return kind(**accepted(kind, tree["hyper_parameters"]))


def _say_what_was_left_out(target: str, left_out: Sequence[str]) -> None:
    for each in left_out:
        _say(f"left out: {each}")
    _say(f"{target} was written.")


def _usage() -> str:
    lines = ["usage: drivetrain checkpoint ACTION [options]", "", "actions:"]
    lines += [f"  {name:12} {text}" for name, text in ACTIONS.items()]
    lines += ["", "'drivetrain checkpoint ACTION --help' shows the options of an action."]
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
