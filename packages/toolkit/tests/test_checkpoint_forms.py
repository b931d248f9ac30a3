"""Single files, comparing, inspecting and tidying up. Rules K19 to K22."""

from __future__ import annotations

import io as memory
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain_interfaces.checkpoint import (
    Refused,
    SupportsConvert,
    SupportsInspect,
    SupportsPrune,
    SupportsVerify,
)
from drivetrain_interfaces.errors import CheckpointError, ConfigurationError
from torch import nn

from drivetrain_toolkit.checkpoint import STATE, DirectoryCheckpointIO


@dataclass
class Mystery:
    x: int


class Attributes(dict[str, Any]):
    """A mapping of a class that nobody knows here."""


@pytest.fixture
def io() -> DirectoryCheckpointIO:
    return DirectoryCheckpointIO()


def tree() -> dict[str, Any]:
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    return {
        "module": {"w": weight, "tied": weight, "n": torch.tensor(3), "h": weight.bfloat16()},
        "optimizers": [{"state": {"w": {"m": weight * 2}}, "groups": [{"betas": (0.9, 0.99)}]}],
        "loop": {"step": 7, "nan": float("nan"), "big": 2**80, 5: "five", "$": "dollar"},
        "callbacks": {"path": Path("a/b"), "when": datetime(2026, 1, 2, tzinfo=timezone.utc)},
        "raw": b"\x00\xff",
        "np": np.float32(1.5),
        "ordered": OrderedDict(a=1),
        "size": torch.Size([1, 2]),
        "eight": weight.to(torch.float8_e4m3fn),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and torch.equal(
                one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
            )
            if one.dim()
            else bool(one == other)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    return bool(type(one) is type(other) and (one == other or (one != one and other != other)))


def test_it_satisfies_the_contracts(io: DirectoryCheckpointIO) -> None:
    for contract in (SupportsConvert, SupportsInspect, SupportsPrune, SupportsVerify):
        assert isinstance(io, contract)


def test_a_file_for_torch_load_and_back(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K19: weights_only reads it, and everything comes back from it, as it was."""
    io.save(tree(), str(tmp_path / "a"))
    assert io.convert(str(tmp_path / "a"), str(tmp_path / "b.ckpt"), "torch") == []
    read = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert torch.equal(read["module"]["w"], tree()["module"]["w"])
    assert read["optimizers"][0]["groups"][0]["betas"] == (0.9, 0.99)
    assert read["callbacks"]["path"] == {"$": "path", "value": "a/b"}
    assert same(io.read_file(str(tmp_path / "b.ckpt")), tree())
    assert io.convert(str(tmp_path / "b.ckpt"), str(tmp_path / "c"), "directory") == []
    back = io.load(str(tmp_path / "c"))
    assert same(back, tree())
    assert back["module"]["w"] is back["module"]["tied"]
    assert io.diff(str(tmp_path / "a"), str(tmp_path / "c")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.ckpt", "c"]


def test_weights_as_safetensors_and_back(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K19"""
    from safetensors.torch import load_file

    io.save(tree(), str(tmp_path / "a"))
    left_out = io.convert(str(tmp_path / "a"), str(tmp_path / "w.safetensors"), "safetensors")
    assert left_out == [part for part in tree() if part != "module"]
    read = load_file(tmp_path / "w.safetensors")
    assert same(dict(sorted(read.items())), dict(sorted(tree()["module"].items())))
    back = io.read_file(str(tmp_path / "w.safetensors"))
    assert same(dict(sorted(back["module"].items())), dict(sorted(tree()["module"].items())))


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_late_dtypes_are_named_for_other_readers(
    io: DirectoryCheckpointIO, tmp_path: Path, dtype: torch.dtype
) -> None:
    from safetensors.torch import load_file

    weight = torch.ones(2).to(dtype)
    io.save(
        {"module": {"w": weight, "z": torch.ones(1, dtype=torch.complex128)}}, str(tmp_path / "a")
    )
    left_out = io.convert(str(tmp_path / "a"), str(tmp_path / "w"), "safetensors")
    assert left_out == ["module/z"]
    assert load_file(tmp_path / "w")["w"].dtype == dtype
    assert io.read_file(str(tmp_path / "w"))["module"]["w"].dtype == dtype


def test_files_of_others_are_read_without_their_code(
    io: DirectoryCheckpointIO, tmp_path: Path
) -> None:
    """K20: as other frameworks write them, with classes among the data."""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    saved = {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": Attributes(width=3, lr=0.1),
        "callbacks": {"x": Mystery(3), "y": [Mystery(1), 2]},
        "class": nn.ReLU,
        "parameter": nn.Parameter(torch.ones(2)),
        "half": torch.ones(4, dtype=torch.bfloat16)[1:3],
        "uint16": torch.ones(2, dtype=torch.uint16),
        "dtype": torch.float32,
        "view": torch.arange(12).reshape(3, 4).t()[1],
    }
    torch.save(saved, tmp_path / "foreign.ckpt")
    back = io.read_file(str(tmp_path / "foreign.ckpt"))
    assert same(dict(back["state_dict"]), dict(module.state_dict()))
    assert same(back["optimizer_states"], [optimizer.state_dict()])
    assert back["hyper_parameters"].items == {"width": 3, "lr": 0.1}
    assert back["hyper_parameters"].kind.endswith(".Attributes")
    assert isinstance(back["callbacks"]["x"], Refused)
    assert back["class"] == Refused("torch.nn.modules.activation.ReLU")
    assert torch.equal(back["parameter"], torch.ones(2))
    for name in ("half", "uint16", "view"):
        assert same(back[name], saved[name]), name
    left_out = io.convert(str(tmp_path / "foreign.ckpt"), str(tmp_path / "a"), "directory")
    assert [each.split(" ")[0] for each in left_out] == ["callbacks/x", "callbacks/y/0", "class"]
    tidy = io.load(str(tmp_path / "a"))
    assert tidy["hyper_parameters"] == {"width": 3, "lr": 0.1}
    assert tidy["callbacks"] == {"y": [None, 2]}


def test_every_protocol_of_torch_save_is_read(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.ckpt"
        torch.save({"a": torch.ones(2), "b": (1, "x", None)}, path, pickle_protocol=protocol)
        back = io.read_file(str(path))
        assert same(back, {"a": torch.ones(2), "b": (1, "x", None)})


def test_a_changed_file_of_torch_save_is_refused(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K20: its own checksums find a flipped bit of a record."""
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.arange(100.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor(57.0).numpy().tobytes())] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="archive is damaged"):
        io.read_file(str(path))


def test_nothing_is_written_over(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    io.save(tree(), str(tmp_path / "a"))
    (tmp_path / "b").touch()
    for form in ("directory", "torch", "safetensors"):
        with pytest.raises(CheckpointError, match="something already"):
            io.convert(str(tmp_path / "a"), str(tmp_path / "b"), form)
    with pytest.raises(ConfigurationError, match="'directory', 'torch' and 'safetensors'"):
        io.convert(str(tmp_path / "a"), str(tmp_path / "c"), "onnx")
    io.save({"x": 1}, str(tmp_path / "d"))
    with pytest.raises(CheckpointError, match="no part 'module'"):
        io.convert(str(tmp_path / "d"), str(tmp_path / "e"), "safetensors")


def test_inspecting_tells_what_is_in_it(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K21"""
    io.save(tree(), str(tmp_path / "a"))
    facts = io.inspect(str(tmp_path / "a"))
    assert (facts.form, facts.version, facts.path) == ("directory", 1, str(tmp_path / "a"))
    assert facts.tensors["module/w"].shape == (3, 2)
    assert facts.tensors["module/w"].files == ("tensors.safetensors",)
    assert facts.values["loop/step"] == 7
    assert facts.values["loop/5"] == "five"
    assert facts.values["callbacks/path"] == "path a/b"
    assert facts.values["optimizers/0/groups/0/betas/1"] == 0.99
    assert facts.files[STATE] == (tmp_path / "a" / STATE).stat().st_size
    io.convert(str(tmp_path / "a"), str(tmp_path / "b"), "torch")
    single = io.inspect(str(tmp_path / "b"))
    assert single.form == "torch"
    assert single.values == facts.values
    assert single.tensors.keys() == facts.tensors.keys()


def test_a_diff_names_places_and_both_sides(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K21"""
    one = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.ones(2), "d": 1, "e": 1, "n": 0.5}
    other = {
        "a": torch.tensor([0, 0.5, -2]), "b": torch.ones(3), "c": torch.ones(2).half(),
        "d": 2, "f": torch.ones(1), "n": 0.5,
    }  # fmt: skip
    io.save(one, str(tmp_path / "x"))
    io.save(other, str(tmp_path / "y"))
    found = [(d.place, d.kind, d.detail) for d in io.diff(str(tmp_path / "x"), str(tmp_path / "y"))]
    assert found == [
        ("a", "value", "2 of 3 items, by up to 2"),
        ("b", "shape", "(2,) and (3,)"),
        ("c", "dtype", "float32 and float16"),
        ("d", "value", "1 and 2"),
        ("e", "first only", "1"),
        ("f", "second only", "float32 of shape (1,)"),
    ]
    assert io.diff(str(tmp_path / "x"), str(tmp_path / "x")) == []


def test_every_damaged_file_is_told_at_once(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K22"""
    io.save(tree(), str(tmp_path / "a"))
    assert io.verify(str(tmp_path / "a")) == []
    with (tmp_path / "a" / "tensors.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    (tmp_path / "a" / STATE).unlink()
    (tmp_path / "a" / "extra").touch()
    assert io.verify(str(tmp_path / "a")) == [
        "state.json: it is missing",
        "extra: the manifest does not name it",
        "tensors.safetensors: its content is not what was written",
    ]
    assert "nothing" in io.verify(str(tmp_path / "missing"))[0]


def test_pruning_keeps_the_newest_that_are_whole(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    """K22"""
    for name in ("a", "b", "c", "d", "e"):
        io.save({"t": torch.ones(3), "n": name}, str(tmp_path / name))
    (tmp_path / "last").symlink_to("a")
    with (tmp_path / "e" / "tensors.safetensors").open("r+b") as file:
        file.write(b"\x99")
    assert io.prune(str(tmp_path), 2) == [str(tmp_path / "b")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d", "e", "last"]
    assert io.prune(str(tmp_path), 2) == []
    with pytest.raises(ConfigurationError, match="Keep one"):
        io.prune(str(tmp_path), 0)


def test_a_bare_pickle_and_nothing_are_told(io: DirectoryCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="bare pickle"):
        io.read_file(str(tmp_path / "p"))
    with pytest.raises(CheckpointError, match="there is none"):
        io.read_file(str(tmp_path / "missing"))
    buffer = memory.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/other", b"")
    (tmp_path / "z").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"no record data\.pkl"):
        io.read_file(str(tmp_path / "z"))
