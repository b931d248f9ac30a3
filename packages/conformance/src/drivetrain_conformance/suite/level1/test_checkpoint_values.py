"""What a checkpoint holds: the same values of the same class, bit for bit."""

from __future__ import annotations

import datetime as dt
import json
import math
import pathlib
import struct
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
from drivetrain_interfaces import CheckpointError, SupportsListing

from drivetrain_conformance.outcomes import BY_DECLARATION
from drivetrain_conformance.support.messages import refused

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain_interfaces import CheckpointIO

_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex64", "complex128"),
)
#: Older versions of torch lack some.
DTYPES = [getattr(torch, name) for name in _NAMES if hasattr(torch, name)]


def back(io: CheckpointIO, folder: Path, value: Any) -> Any:
    """A value after a round trip."""
    path = str(folder / "c.ckpt")
    io.save({"value": value}, path)
    return io.load(path)["value"]


def bits(tensor: torch.Tensor) -> bytes:
    """The memory of a tensor, in order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_tensors_come_back_bit_for_bit(
    checkpoint_io: CheckpointIO, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Of every dtype, also a scalar, an empty one, and one that is not contiguous.

    R: K9
    """
    base = torch.arange(12).reshape(3, 4)
    tensors = {
        "matrix": base.to(dtype),
        "transposed": base.to(dtype).t(),
        "scalar": base[1, 1].to(dtype),
        "empty": torch.empty((0, 3)).to(dtype),
        "slice": base.to(dtype)[1:, ::2],
    }
    found = back(checkpoint_io, tmp_path, tensors)
    for key, tensor in tensors.items():
        assert found[key].dtype is dtype, f"K9: {key} of {dtype} comes back as {found[key].dtype}"
        assert found[key].shape == tensor.shape, f"K9: {key} of {dtype} changed its shape"
        assert bits(found[key]) == bits(tensor), f"K9: {key} of {dtype} changed its bits"


def test_special_numbers_in_tensors_come_back(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """Infinities, NaNs with their payload, signed zeros and subnormals.

    R: K9
    """
    pattern = [0x7F800000, 0x7FC00001, 0x80000000, 0x00000001, 0x7F7FFFFF]
    tensor = torch.tensor(pattern, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert bits(back(checkpoint_io, tmp_path, tensor)) == bits(tensor), (
        "K9: what comes back is equal bit for bit, also inf, NaN, -0.0 and subnormals"
    )


PLAIN = {
    "none": None,
    "true": True,
    "zero": 0,
    "large": 2**80,
    "float": 0.1,
    "infinite": -math.inf,
    "text": "Ünïcode\n\0\ud7ff",
    "list": [1, [2.0, None]],
    "tuple": (1, ("a",)),
    "set": {1, 2},
    "frozenset": frozenset({"a"}),
    "dict": {"$": 1, "a/b": {"c": 2}},
    "keys": {1: "int", (1, 2): "tuple", None: "none", "1": "text"},
    "ordered": OrderedDict([("b", 1), ("a", 2)]),
    "counter": Counter("hello"),
    "deque": deque([1, 2], maxlen=5),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "complex": complex(1.5, -2),
    "path": pathlib.Path("a/b"),
    "date": dt.date(2026, 1, 2),
    "time": dt.time(1, 2, 3, 4),
    "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.timezone.utc),
    "timedelta": dt.timedelta(days=-1, microseconds=1),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "nested": {"a": [{"b": (torch.ones(2),)}]},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_come_back(checkpoint_io: CheckpointIO, tmp_path: Path, name: str) -> None:
    """Equal, and of the same class.

    R: K9
    """
    check_same(back(checkpoint_io, tmp_path, PLAIN[name]), PLAIN[name], name)


def check_same(found: Any, wanted: Any, where: str) -> None:
    """Equal, and of the same class, all the way down."""
    assert type(found) is type(wanted), (
        f"K9: what comes back is of the same class; {where} was a {type(wanted).__name__} and is a "
        f"{type(found).__name__}"
    )
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), f"K9: the tensor {where} changed"
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), f"K9: the keys of {where} changed: {list(found)}"
        for key, value in wanted.items():
            check_same(found[key], value, f"{where}[{key!r}]")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), f"K9: the length of {where} changed"
        for number, value in enumerate(wanted):
            check_same(found[number], value, f"{where}[{number}]")
    else:
        assert found == wanted, f"K9: {where} was {wanted!r} and is {found!r}"


def test_not_a_number_comes_back(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """As a float, not as a text.

    R: K9
    """
    found = back(checkpoint_io, tmp_path, math.nan)
    assert type(found) is float, f"K9: NaN comes back as a float, not as {found!r}"
    assert math.isnan(found), f"K9: NaN comes back as NaN, not as {found!r}"


def test_a_parameter_comes_back_as_a_tensor(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """On the host and without a gradient.

    R: K9
    """
    found = back(checkpoint_io, tmp_path, torch.nn.Parameter(torch.ones(2)))
    assert type(found) is torch.Tensor, f"K9: a parameter comes back as a tensor, not {type(found)}"
    assert not found.requires_grad, "K9: tensors come back without gradients"


def test_a_tensor_that_is_there_twice_is_one(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """Saved once, and one object afterwards.

    R: K9
    """
    tensor = torch.ones(4096)
    found = back(checkpoint_io, tmp_path, {"a": tensor, "b": [tensor]})
    assert found["a"] is found["b"][0], "K9: a tensor that is there twice comes back as one"
    size = sum(f.stat().st_size for f in (tmp_path / "c.ckpt").iterdir())
    assert size < 2 * tensor.nbytes, f"K9: it is saved once; the files have {size} bytes"


def test_tensors_on_the_device_come_back_on_the_host(
    checkpoint_io: CheckpointIO, bind: Any, tmp_path: Path
) -> None:
    """Any machine can load them.

    R: K9
    """
    strategy = bind()
    there = strategy.feed(torch.arange(4.0))
    found = back(checkpoint_io, tmp_path, there)
    assert found.device.type == "cpu", f"K9: tensors come back on the host, not on {found.device}"
    assert torch.equal(found, torch.arange(4.0)), "K9: and equal"


class Own:
    """A class that no codec knows."""


def cycle() -> list[Any]:
    """A list that contains itself."""
    made: list[Any] = []
    made.append(made)
    return made


REFUSED = {
    "object": Own,
    "class": lambda: Own,
    "function": lambda: cycle,
    "sparse": lambda: torch.ones(2).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "cycle": cycle,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_before_anything_is_written(
    checkpoint_io: CheckpointIO, tmp_path: Path, name: str
) -> None:
    """With its place in the tree.

    R: K10, K8
    """
    value = REFUSED[name]()
    rule = f"K10: a {name} is refused by save, with its place in the tree"
    with refused(CheckpointError, naming="deep", rule=rule):
        checkpoint_io.save({"a": {"deep": [value]}}, str(tmp_path / "c.ckpt"))
    assert list(tmp_path.iterdir()) == [], "K10: it is refused before anything is written"


def test_the_layout_is_the_shared_one(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """Three plain files, which any backend reads; the tensors any reader of their format.

    R: K1, K2, B17
    """
    path = tmp_path / "c.ckpt"
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    checkpoint_io.save({"layer": {"weight": tensor}, "epoch": 3}, str(path))
    names = sorted(item.name for item in path.iterdir())
    assert names == ["manifest.json", "state.json", "tensors.safetensors"], (
        f"K1: a checkpoint is a directory of three files; this one has {names}"
    )
    raw = (path / "tensors.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ((name, facts),) = [(k, v) for k, v in header.items() if k != "__metadata__"]
    start, end = facts["data_offsets"]
    assert raw[8 + length :][start:end] == bits(tensor), (
        f"K1: the file of tensors can be read by any reader of its format; {name!r} differs"
    )
    assert (facts["dtype"], facts["shape"]) == ("F32", [2, 3]), f"K1: its header says {facts}"
    manifest = json.loads((path / "manifest.json").read_text("ascii"))
    assert manifest["version"] == 1, f"K2: the manifest states format version 1: {manifest}"
    for file in ("state.json", "tensors.safetensors"):
        assert manifest["files"][file]["size"] == (path / file).stat().st_size, (
            f"K2: the manifest states the size of {file}"
        )
    assert [tuple(f["shape"]) for f in manifest["tensors"].values()] == [(2, 3)], (
        "K2: the manifest states dtype and shape of each tensor"
    )


def test_saving_again_replaces(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """The same path holds the last tree, and nothing of the one before.

    R: K3
    """
    path = str(tmp_path / "c.ckpt")
    checkpoint_io.save({"a": torch.ones(2), "old": 1}, path)
    checkpoint_io.save({"a": torch.zeros(3)}, path)
    found = checkpoint_io.load(path)
    assert list(found) == ["a"], f"K3: save replaces what was there; it left {list(found)}"
    assert torch.equal(found["a"], torch.zeros(3)), "K3: save replaces what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["c.ckpt"], "K3: and leaves nothing beside it"


def test_the_newest_is_listed_first(checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
    """By the manifests' time; what is incomplete is left out.

    R: K2
    """
    if not isinstance(checkpoint_io, SupportsListing):
        pytest.skip(f"{BY_DECLARATION}the checkpoint IO lists nothing")
    for name in ("b", "a", "c"):
        checkpoint_io.save({"name": name}, str(tmp_path / name))
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "notes").mkdir()
    found = [pathlib.Path(path).name for path in checkpoint_io.list(str(tmp_path))]
    assert found == ["c", "b"], (
        f"K2: list gives complete checkpoints, the newest first, here c and b; it gave {found}"
    )
