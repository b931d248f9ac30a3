"""Checkpoints as single files: of ``torch.save``, and of safetensors.

A file of ``torch.save`` holds the tree with everything that ``torch.load(weights_only=True)`` can
read as what it is: containers, numbers, text and tensors. Any other value is there as its codec
writes it, a mapping with the key ``"$"``, and is decoded when the file is read here.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from drivetrain_interfaces.checkpoint import Refused
from drivetrain_interfaces.errors import CheckpointError, StorageError

from drivetrain_toolkit import durable
from drivetrain_toolkit.codecs import TAG, join
from drivetrain_toolkit.tensorfile import (
    DTYPES,
    BadFileError,
    fill,
    pieces,
    read_header,
    write_tensors,
)
from drivetrain_toolkit.torchfile import read_torch_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from drivetrain_toolkit.codecs import Codecs

DIRECTORY: Final = "directory"
TORCH: Final = "torch"
SAFETENSORS: Final = "safetensors"
_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"
_WEIGHTS: Final = "module"
_MOST_LEFT_OUT: Final = 10_000  # that are named
# What torch.load(weights_only=True) knows besides JSON's own kinds.
_PLAIN: Final = ("dict", "tuple", "int", "float", "ordered_dict", "torch.Size")


def form_of(path: str) -> str:
    """``"directory"``, ``"torch"`` or ``"safetensors"``, by what is at ``path``.

    Raises:
        CheckpointError: There is nothing, or a pickle.
        OSError: It cannot be read.
    """
    if os.path.isdir(path):
        return DIRECTORY
    if not os.path.isfile(path):
        raise CheckpointError(
            f"A checkpoint was to be read from {path!r}, where there is none.",
            "Give the path of a checkpoint.",
        )
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE):
        raise CheckpointError(
            f"The file {path!r} was to be read, and is a bare pickle, which can run code.",
            "If you trust it, load it with torch and save it again with torch.save.",
        )
    return TORCH if start == _ZIP else SAFETENSORS


def read_single(path: str, codecs: Codecs) -> dict[str, Any]:
    """The tree of a single file; weights of a safetensors file are under ``"module"``.

    Raises:
        CheckpointError: It is damaged, or no file of these forms.
        OSError: It cannot be read.
    """
    if form_of(path) == SAFETENSORS:
        return {_WEIGHTS: _read_safetensors(path)}
    with open(path, "rb") as file:
        tree = read_torch_file(file, os.fstat(file.fileno()).st_size, path)
    with _deep_enough(path):
        tree = _restored(tree, codecs)
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"The file {path!r} holds a {type(tree).__name__}, and a checkpoint is a mapping.",
            "Save a mapping, such as a state_dict.",
        )
    return tree


def without_refused(tree: Any, path: str) -> tuple[Any, list[str]]:
    """A tree that can be saved, and what was left out of it: places and what the file calls it.

    A mapping of an unknown class becomes a plain one.
    """
    left_out: list[str] = []
    with _deep_enough(path):
        return _cleaned(tree, "", left_out), left_out


@contextmanager
def _deep_enough(path: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise CheckpointError(
            f"The file {path!r} was to be read, and is nested too deeply.", "Use another file."
        ) from error


def write_torch(path: str, state: Any, tensors: Mapping[str, torch.Tensor], codecs: Codecs) -> None:
    """Write a file for ``torch.load(weights_only=True)``.

    Args:
        path: A new file.
        state: The tree as JSON values.
        tensors: Those that it names.
        codecs: To make containers and numbers of what JSON has no kind for.
    """
    tree = _plain(state, tensors, codecs)

    def write(draft: str) -> None:
        try:
            torch.serialization.save(tree, draft)  # a vendor may replace torch.save
        except RuntimeError as error:
            raise StorageError(
                f"The file {path!r} was to be written, and the system refused.",
                "Make sure that there is room, and that the directory may be written.",
            ) from error

    _write_whole(path, write)


def write_safetensors(path: str, tree: Mapping[str, Any]) -> list[str]:
    """Write the weights of a tree, by the names of the module's ``state_dict``.

    Returns:
        Places of what is no weight, or of a dtype that the format lacks.
    """
    weights = tree.get(_WEIGHTS)
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"A checkpoint was to become {path!r}, and has {sorted(tree)} but no part 'module' "
            "with weights.",
            "Convert a checkpoint of a training run, or use the form 'torch'.",
        )
    known = set(DTYPES.values())
    kept = {
        name: value
        for name, value in weights.items()
        if isinstance(value, torch.Tensor) and value.dtype in known
    }
    left_out = [part for part in tree if part != _WEIGHTS]
    left_out += [join(_WEIGHTS, name) for name in weights if name not in kept]
    _write_whole(
        path,
        lambda draft: durable.write_file(
            draft, lambda write: write_tensors(kept, write, by_others=True)
        ),
    )
    return left_out


def _write_whole(path: str, write: Callable[[str], object]) -> None:
    """Write under a hidden name, and give it its name when it is on the disk."""
    durable.make_directories(os.path.dirname(path))
    draft = durable.hidden_sibling(path)
    try:
        write(draft)
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.rename(draft, path)
        durable.sync_directory(os.path.dirname(path))
    finally:
        durable.discard(draft)


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for slot in read_header(file, size, lambda _: None):
                found[slot.key] = torch.empty(slot.shape, dtype=DTYPES[slot.dtype])
                for piece in pieces(found[slot.key]):
                    fill(file, piece)
    except BadFileError as error:
        raise CheckpointError(
            f"The file {path!r} was to be read as safetensors, and cannot be: {error}.",
            "Use another file.",
        ) from error
    return found


def _plain(value: Any, tensors: Mapping[str, torch.Tensor], codecs: Codecs) -> Any:
    """JSON values with tensors in place of their names, and containers of torch's choice."""
    if isinstance(value, list):
        return [_plain(item, tensors, codecs) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: _plain(item, tensors, codecs) for key, item in value.items()}
    if value[TAG] == "tensor":
        return tensors[value["name"]]
    inner = _plain(value["value"], tensors, codecs)
    if value[TAG] in _PLAIN:
        made = codecs.decode({TAG: value[TAG], "value": inner}, {})
        if not (isinstance(made, dict) and TAG in made):
            return made
    return {TAG: value[TAG], "value": inner}


def _restored(value: Any, codecs: Codecs) -> Any:
    """The other way round. What no codec here has written stays as it is."""
    if isinstance(value, list):
        return [_restored(item, codecs) for item in value]
    if type(value) is tuple:
        return tuple(_restored(item, codecs) for item in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {TAG, "value"} and value[TAG] in codecs.names:
        return codecs.decode({TAG: value[TAG], "value": _restored(value["value"], codecs)}, {})
    pairs = [(key, _restored(item, codecs)) for key, item in value.items()]
    return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)


def _cleaned(value: Any, where: str, left_out: list[str]) -> Any:
    if isinstance(value, Refused) and value.items:
        return _cleaned(value.items, where, left_out)
    if isinstance(value, dict):
        items = {
            key: _cleaned(item, join(where, key), left_out)
            for key, item in value.items()
            if not _gone(item, join(where, key), left_out)
        }
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if type(value) in (list, tuple):
        # None keeps the numbers of the others.
        items_in_order = [
            None
            if _gone(item, join(where, number), left_out)
            else _cleaned(item, join(where, number), left_out)
            for number, item in enumerate(value)
        ]
        return items_in_order if isinstance(value, list) else tuple(items_in_order)
    return value


def _gone(value: Any, where: str, left_out: list[str]) -> bool:
    if not isinstance(value, Refused) or value.items:
        return False
    if len(left_out) < _MOST_LEFT_OUT:
        left_out.append(f"{where} ({value.kind})")
    elif len(left_out) == _MOST_LEFT_OUT:
        left_out.append("and more")
    return True
