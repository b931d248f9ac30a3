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
        header = json.dumps(_encoded(tree, tensors, "")).encode("utf-8")
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
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{path} could not be written: {error.strerror or error}.",
                "Make room, or use a folder that can be written.",
            ) from error

    def load(self, path: str) -> dict[str, Any]:
        """Read it back, tensors on the host. Raises ``CheckpointError`` if it is not whole."""
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
        return dict(_decoded(header, memoryview(body)[_LENGTH + size :]))

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


def _encoded(value: Any, tensors: list[Tensor], place: str) -> Any:
    """A value as JSON, each container tagged, tensors by dtype, shape and where their bytes are."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _DTYPES or value.layout is not torch.strided:
            raise CheckpointError(
                f"The tensor at {place or '/'!r} is {value.dtype}, {value.layout}, which has no "
                "plain bytes here.",
                "Convert it before it is saved.",
            )
        start = sum(t.numel() * t.element_size() for t in tensors)
        tensors.append(value)
        return {"tensor": [name, list(value.shape), start]}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, tensors, f"{place}/{n}") for n, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if hasattr(value, "items"):
        pairs = [
            [_encoded(k, tensors, place), _encoded(v, tensors, f"{place}/{k}")]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    raise CheckpointError(
        f"The value at {place or '/'!r} is a {type(value).__name__}, which this format does not "
        "hold.",
        "Save plain values and tensors.",
    )


def _decoded(value: Any, raw: memoryview) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {_decoded(k, raw): _decoded(v, raw) for k, v in inner}
    if kind == "tensor":
        name, shape, start = inner
        dtype = _DTYPES[name]
        count = int(np.prod(shape, dtype=np.int64))
        kinds = np.dtype(name if name != "bool" else "?")
        made = np.frombuffer(raw, kinds, count, start).copy()
        return torch.from_numpy(made).to(dtype).reshape(tuple(shape))
    items = [_decoded(item, raw) for item in inner]
    return tuple(items) if kind == "tuple" else items
