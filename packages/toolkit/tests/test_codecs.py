"""Values that a checkpoint can hold. Rules K9 to K12 of docs/contracts/checkpoint.md."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from enum import Enum, IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from drivetrain_interfaces.errors import CheckpointError, ConfigurationError

from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.codecs import CODECS, Codecs


class Colour(Enum):
    RED = 1
    GREEN = 2


class Level(IntEnum):
    LOW = 1


@dataclass(frozen=True)
class Point:
    x: float
    tag: Any = None
    norm: float = field(init=False, default=0.0)


@dataclass
class Unknown:
    x: int


class Pair(NamedTuple):
    a: int
    b: int


def through_json(value: Any, codecs: Codecs | None = None) -> Any:
    codecs = codecs or Codecs()
    tensors: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, where: str) -> str:
        tensors[where] = tensor
        return where

    text = json.dumps(codecs.encode(value, keep), allow_nan=False)
    return codecs.decode(json.loads(text), tensors)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**70),
        2**63,
        10**5000,
        0.1,
        -0.0,
        1e-320,
        math.inf,
        -math.inf,
        "",
        "ümlaut \ud800 \x00",
        [],
        [1, [2.5, None]],
        (),
        (1, (2,)),
        {},
        {"a": {"b": [1]}},
        {"$": "tensor"},
        {1: "x", None: "y", (1, 2): "z", 2.5: 0, False: 1},
        {1, 2},
        frozenset({"a", ("b",)}),
        OrderedDict(b=1, a=2),
        Counter("aab"),
        deque([1, 2], maxlen=5),
        b"\x00\xff",
        bytearray(b"abc"),
        1 - 2j,
        Path("/a/b"),
        date(2024, 2, 29),
        time(1, 2, 3, 4),
        datetime(2024, 1, 2, 3, 4, 5, 6),
        datetime(2024, 1, 2, tzinfo=timezone(timedelta(hours=-3))),
        timedelta(days=-1, microseconds=7),
        torch.float32,
        torch.bfloat16,
        torch.device("cpu"),
        torch.device("cuda:1"),
        torch.Size([2, 0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_back_equal_and_of_its_class(value: Any) -> None:
    """K9"""
    back = through_json(value)
    assert type(back) is type(value)
    assert back == value
    if isinstance(value, float):
        assert math.copysign(1, back) == math.copysign(1, value)
    if isinstance(value, dict):
        assert [(type(key), key) for key in back] == [(type(key), key) for key in value]
    if isinstance(value, deque):
        assert back.maxlen == value.maxlen


def test_a_nan_keeps_its_payload() -> None:
    """K9"""
    bits = "7ff80000000abcde"
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert struct.pack(">d", through_json(value)).hex() == bits


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.array(3.5),
        np.zeros((0, 2), np.float16),
        np.array(["ab", "c"]),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array(["2024-01-01"], dtype="datetime64[D]"),
        np.arange(3, dtype=">f8"),
    ],
    ids=lambda array: array.dtype.str,
)
def test_an_array_comes_back_bit_for_bit_and_writable(array: np.ndarray[Any, Any]) -> None:
    """K9"""
    back = through_json({"a": array})["a"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.writeable


@pytest.mark.parametrize("value", [np.float32(0.1), np.int64(-1), np.bool_(1), np.float64("nan")])
def test_a_numpy_scalar_stays_one(value: Any) -> None:
    """K9"""
    back = through_json(value)
    assert type(back) is type(value)
    assert back.tobytes() == value.tobytes()


def test_a_read_only_mapping_becomes_a_dict() -> None:
    assert through_json(MappingProxyType({"a": 1})) == {"a": 1}


def test_tensors_are_kept_by_their_place_and_shared_ones_stay_one() -> None:
    tensor = torch.arange(3)
    seen: list[str] = []
    codecs = Codecs()

    def keep(value: torch.Tensor, where: str) -> str:
        seen.append(where)
        return "t"

    encoded = codecs.encode({"a/b": [tensor], 1: (tensor,)}, keep)
    back = codecs.decode(json.loads(json.dumps(encoded)), {"t": tensor})
    assert seen == ["a~1b/0", "1/0"]
    assert back["a/b"][0] is back[1][0] is tensor


@pytest.mark.parametrize(
    "value",
    [
        object(),
        lambda: None,
        Unknown(1),
        Colour.RED,
        Level.LOW,
        Pair(1, 2),
        defaultdict(list),
        range(3),
        np.array([object()]),
        np.ma.masked_array([1], [True]),
        datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")),
        type("S", (str,), {})("x"),
        int,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_come_back_the_same_is_refused_with_its_place(value: Any) -> None:
    """K10"""
    with pytest.raises(CheckpointError, match="'callbacks/0/best'") as caught:
        through_json({"callbacks": [{"best": value}]})
    assert caught.value.hint


def test_the_refusal_says_how_to_register() -> None:
    """K10"""
    with pytest.raises(CheckpointError, match=r"codecs\.register\(Unknown\)"):
        through_json([Unknown(1)])
    with pytest.raises(CheckpointError, match=r"register\(object, encode=…, decode=…\)"):
        through_json([object()])


def test_a_cycle_is_refused() -> None:
    """K10"""
    tree: dict[str, Any] = {"a": []}
    tree["a"].append(tree)
    with pytest.raises(CheckpointError, match="contains itself"):
        through_json(tree)


def test_a_tree_without_end_is_refused() -> None:
    """K10"""
    tree: list[Any] = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(CheckpointError, match="nested too deeply"):
        through_json(tree)


def test_registered_enums_and_dataclasses_come_back() -> None:
    """K11"""
    codecs = Codecs()
    codecs.register(Colour)
    codecs.register(Level, name="level")
    codecs.register(Point)
    point = Point(1.5, tag=(Colour.GREEN, torch.ones(2)))
    object.__setattr__(point, "norm", 7.0)
    back = through_json([Colour.RED, Level.LOW, point], codecs)
    assert back[0] is Colour.RED
    assert back[1] is Level.LOW
    assert (back[2].x, back[2].norm, back[2].tag[0]) == (1.5, 7.0, Colour.GREEN)
    assert torch.equal(back[2].tag[1], torch.ones(2))


def test_a_registered_class_uses_its_functions() -> None:
    """K11"""
    codecs = Codecs()
    codecs.register(range, encode=lambda r: [r.start, r.stop, r.step], decode=lambda a: range(*a))
    assert through_json({"r": range(1, 9, 2)}, codecs) == {"r": range(1, 9, 2)}


def test_registering_twice_is_fine_and_a_taken_name_is_not() -> None:
    """K11"""
    codecs = Codecs()
    codecs.register(Colour)
    codecs.register(Colour)
    with pytest.raises(ConfigurationError, match="'Colour'"):
        codecs.register(Level, name="Colour")
    with pytest.raises(ConfigurationError, match="'tuple'"):
        codecs.register(Point, name="tuple")
    with pytest.raises(ConfigurationError, match="'tensor'"):
        codecs.register(Point, name="tensor")
    with pytest.raises(ConfigurationError, match="neither an enum nor a dataclass"):
        codecs.register(range)


def test_decoding_looks_names_up_and_imports_nothing() -> None:
    """K12"""
    codecs = Codecs()
    with pytest.raises(CheckpointError, match=r"'a/0'.*'os.system'"):
        codecs.decode({"a": [{"$": "os.system", "value": "true"}]}, {})
    with pytest.raises(CheckpointError, match=r"'torch\.dtype'"):
        codecs.decode({"$": "torch.dtype", "value": "load"}, {})
    with pytest.raises(CheckpointError, match=r"numpy\.ndarray"):
        codecs.decode({"$": "numpy.ndarray", "value": {"dtype": "O", "shape": [1], "data": ""}}, {})
    with pytest.raises(CheckpointError, match="tensor 'x'"):
        codecs.decode({"$": "tensor", "name": "x"}, {})


@pytest.mark.parametrize("name", [None, 1, ["a"], {"b": 1}])
def test_a_codec_name_of_another_type_is_refused(name: Any) -> None:
    """K12"""
    with pytest.raises(CheckpointError, match="codec"):
        Codecs().decode({"$": name, "value": 1}, {})
    with pytest.raises(CheckpointError, match="tensor"):
        Codecs().decode({"$": "tensor", "name": name}, {})


def test_a_codec_that_raises_is_named() -> None:
    """K10"""

    def fail(value: Any) -> Any:
        raise RuntimeError("no")

    codecs = Codecs()
    codecs.register(range, name="r", encode=fail, decode=fail)
    with pytest.raises(CheckpointError, match=r"'a'.*'r' could not encode it: RuntimeError: no"):
        codecs.encode({"a": range(2)}, lambda tensor, where: where)
    with pytest.raises(CheckpointError, match="'r', which could not decode it: RuntimeError: no"):
        codecs.decode({"a": {"$": "r", "value": 1}}, {})


def test_configurations_come_back_with_interpolations_and_flags() -> None:
    """K9"""
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"a": 1, "b": {"c": [1, "${a}", None]}, "d": "???", 5: 2.5})
    omegaconf.OmegaConf.set_readonly(config, True)
    back = through_json({"hparams": config, "list": config.b.c})
    assert back["hparams"] == config
    assert type(back["hparams"]) is type(config)
    assert back["hparams"].b.c[1] == 1
    assert omegaconf.OmegaConf.is_readonly(back["hparams"])
    assert omegaconf.OmegaConf.is_missing(back["hparams"], "d")
    assert type(back["list"]) is omegaconf.ListConfig
    with pytest.raises(CheckpointError, match="no configuration"):
        Codecs().decode({"$": "omegaconf.DictConfig", "value": {"value": "a: 1", "flags": {}}}, {})


@pytest.mark.parametrize("dtype", ["O", "|O8", "V8", "f8,f8", "os", "i8,O", "<f8[", "float"])
def test_arrays_of_other_dtypes_are_refused(dtype: str) -> None:
    """K12"""
    value = {"dtype": dtype, "shape": [1], "data": "AAAAAAAAAAA="}
    with pytest.raises(CheckpointError, match="not a dtype of plain data"):
        Codecs().decode({"$": "numpy.ndarray", "value": value}, {})


def test_decoding_sets_no_attribute_that_the_class_does_not_declare() -> None:
    """K12"""
    codecs = Codecs()
    codecs.register(Unknown)
    with pytest.raises(CheckpointError, match="no fields"):
        codecs.decode({"$": "Unknown", "value": {"x": 1, "__class__": 2}}, {})


def test_a_dtype_is_looked_up_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """K12: asking torch for an unknown name can import a module."""
    monkeypatch.setattr(torch, "__getattr__", pytest.fail, raising=False)
    with pytest.raises(CheckpointError, match="not a dtype"):
        Codecs().decode({"$": "torch.dtype", "value": "_dynamo"}, {})


@pytest.mark.parametrize(
    "value",
    [
        b"ab" * 50_000,
        bytearray(b"ab" * 50_000),
        np.arange(100_000, dtype=">i4").reshape(10, -1),
        np.array(["2020-01-01"] * 20_000, dtype="M8[D]"),
        np.array(["a", "bc"] * 20_000),
        np.ones((300, 300)).T[::2],
    ],
    ids=["bytes", "bytearray", "integers", "dates", "texts", "strided"],
)
def test_large_bytes_and_arrays_are_kept_as_tensors(tmp_path: Path, value: Any) -> None:
    """And come back as what they are, from every form."""
    io = DirectoryCheckpointIO()
    io.save({"a": [value, value]}, str(tmp_path / "x"))
    assert (tmp_path / "x/state.json").stat().st_size < 1000
    io.convert(str(tmp_path / "x"), str(tmp_path / "x.pt"), "torch")
    for tree in (
        io.load(str(tmp_path / "x")),
        io.open(str(tmp_path / "x")),
        io.read_file(str(tmp_path / "x.pt")),
    ):
        for back in tree["a"]:
            assert type(back) is type(value)
            np.testing.assert_array_equal(back, value)
            if isinstance(value, np.ndarray):
                assert back.dtype == value.dtype
                assert back.flags.writeable
                back[:1] = back[1:2]  # is nobody else's
    assert io.diff(str(tmp_path / "x"), str(tmp_path / "x.pt")) == []


def test_what_changes_while_it_is_written_is_saved_as_it_was(tmp_path: Path) -> None:
    io, value = DirectoryCheckpointIO(), np.zeros(100_000)
    pending = io.begin_save({"a": value}, str(tmp_path / "x"), staged=True)
    value += 1
    pending.wait()
    assert not io.load(str(tmp_path / "x"))["a"].any()


def test_bytes_that_are_a_tensor_of_numbers_are_refused() -> None:
    text = {"$": "bytes", "value": {"$": "tensor", "name": "w"}}
    with pytest.raises(CheckpointError, match="a tensor of float32"):
        CODECS.decode(text, {"w": torch.ones(2)})
