"""Checkpoints from the host: the shared layout where the toolkit is, a file of our own elsewhere.

The toolkit needs torch 2.6, which no PopTorch works with. Of torch 2.0, ``torch.load`` can be made
to run code even by files that hold ``weights_only`` data; so the format here carries none: a JSON
header, and then the bytes of tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from glob import escape
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from drivetrain_interfaces import CheckpointError, StorageError
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain_interfaces import CheckpointIO

_MAGIC = b"DRIVETRAIN-IPU-1\n"
_LENGTH, _HASH = 8, 32
_DEEPEST = 200
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def make_checkpoint_io() -> CheckpointIO:
    """The toolkit's checkpoint IO where it is installed, that of this module where it is not."""
    if util.find_spec("drivetrain_toolkit") is None:
        return HostCheckpointIO()
    from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO

    return DirectoryCheckpointIO()


class HostCheckpointIO:
    """A checkpoint in one file, which is there completely or not at all."""

    def save(self, tree: Mapping[str, Any], path: str) -> None:
        """Write ``tree``; return once it is on the disk.

        Raises:
            CheckpointError: A value cannot be held, or something else has the name.
            StorageError: The system refuses.
        """
        target = Path(path)
        tensors: list[Tensor] = []
        header = json.dumps(_encoded(tree, tensors, "", ())).encode("utf-8")
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.draft")
        try:
            if target.exists() and not self.exists(path):
                raise CheckpointError(
                    f"{path} is there, and is no checkpoint of this kind.", "Use another name."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(draft, header, tensors)
                draft.replace(target)
                _to_disk(target.parent)
            finally:
                # Those of processes that were killed too: one process saves at a time.
                for left in target.parent.glob(f".{escape(target.name)}.*.draft"):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{path} could not be written: {error.strerror or error}.",
                "Make room, or use a folder that can be written.",
            ) from error

    def load(self, path: str) -> dict[str, Any]:
        """Read it back, tensors on the host. Raises ``CheckpointError`` if it is not whole."""
        if Path(path).is_symlink():
            raise CheckpointError(
                f"{path} is a link, which could lead anywhere.", "Name the checkpoint itself."
            )
        try:
            raw = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"There is no checkpoint {path}.", "Look for its name."
            ) from error
        except OSError as error:
            raise StorageError(
                f"{path} could not be read: {error.strerror or error}.", "Look at its permissions."
            ) from error
        body, told = raw[len(_MAGIC) : -_HASH], raw[-_HASH:]
        if not raw.startswith(_MAGIC) or hashlib.sha256(body).digest() != told:
            raise CheckpointError(
                f"{path} is damaged, or no checkpoint of this kind.", "Use another one."
            )
        size = int.from_bytes(body[:_LENGTH], "little")
        header = json.loads(body[_LENGTH : _LENGTH + size])
        return dict(_decoded(header, memoryview(body)[_LENGTH + size :], {}))

    def exists(self, path: str) -> bool:
        """Whether a checkpoint is there."""
        file = Path(path)
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            return opened.read(len(_MAGIC)) == _MAGIC

    def remove(self, path: str) -> None:
        """Delete it. Missing is not an error; something else is a ``CheckpointError``."""
        if not Path(path).exists():
            return
        if not self.exists(path):
            raise CheckpointError(f"{path} is no checkpoint of this kind.", "Remove it yourself.")
        Path(path).unlink(missing_ok=True)


def _write(draft: Path, header: bytes, tensors: list[Tensor]) -> None:
    digest = hashlib.sha256()
    with draft.open("xb") as file:
        file.write(_MAGIC)
        for piece in (len(header).to_bytes(_LENGTH, "little"), header, *map(_bytes, tensors)):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())


def _to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _encoded(value: Any, tensors: list[Tensor], place: str, within: tuple[int, ...]) -> Any:
    """A value as JSON, each container tagged, tensors by dtype, shape and where their bytes are."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _placed(value, tensors, place)
    if id(value) in within or len(within) > _DEEPEST:
        raise CheckpointError(
            f"The value at {place!r} holds itself, or is in more than {_DEEPEST} others.",
            "Save a tree of plain values and tensors.",
        )
    within = (*within, id(value))
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, tensors, f"{place}/{n}", within) for n, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if hasattr(value, "items"):
        pairs = [
            [_encoded(k, tensors, place, within), _encoded(v, tensors, f"{place}/{k}", within)]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    raise CheckpointError(
        f"The value at {place or '/'!r} is a {type(value).__name__}, which this format does not "
        "hold.",
        "Save plain values and tensors.",
    )


def _placed(value: Tensor, tensors: list[Tensor], place: str) -> dict[str, Any]:
    """Where the bytes of a tensor are; one that is there twice has one place."""
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES or value.layout is not torch.strided or value.is_meta:
        raise CheckpointError(
            f"The tensor at {place or '/'!r} is {value.dtype}, {value.layout}, on {value.device}, "
            "which has no plain bytes here.",
            "Convert it before it is saved.",
        )
    start = 0
    for known in tensors:
        if known is value:
            break
        start += known.numel() * known.element_size()
    else:
        tensors.append(value)
    return {"tensor": [name, list(value.shape), start]}


def _decoded(value: Any, raw: memoryview, made: dict[Any, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {_decoded(k, raw, made): _decoded(v, raw, made) for k, v in inner}
    if kind == "tensor":
        name, shape, start = inner
        count = int(np.prod(shape, dtype=np.int64))
        key = (name, tuple(shape), start)
        if key not in made or not count:
            kinds = np.dtype(name if name != "bool" else "?")
            found = torch.from_numpy(np.frombuffer(raw, kinds, count, start).copy())
            made[key] = found.to(_DTYPES[name]).reshape(tuple(shape))
        return made[key]
    items = [_decoded(item, raw, made) for item in inner]
    return tuple(items) if kind == "tuple" else items
