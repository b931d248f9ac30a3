"""JSON of anybody: what it would take is counted before it is parsed, and never too low."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import torch
from drivetrain_interfaces.errors import CheckpointError

from drivetrain_toolkit import jsontext
from drivetrain_toolkit.checkpoint import DirectoryCheckpointIO
from drivetrain_toolkit.codecs import CODECS
from drivetrain_toolkit.jsontext import TooMuchError, cost_of, parse_json

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 5000


def _list(item: str) -> str:
    return "[" + ",".join(item.replace("#", str(n)) for n in range(COUNT)) + "]"


TEXTS = {
    "lists": _list("[]"),
    "objects": _list("{}"),
    "lists of one": _list("[999]"),
    "objects of one": _list('{"a":1}'),
    "objects of one name each": _list('{"a#":1}'),
    "names": "{" + _list('"#":999')[1:-1] + "}",
    "names of objects": "{" + _list('"#":{}')[1:-1] + "}",
    "numbers": _list("999#"),
    "floats": _list("1.5"),
    "texts": _list('"a#"'),
    "empty texts": _list('""'),
    "accents": _list('"\u00e9\u00e9"'),
    "one wide character": json.dumps("a" * COUNT * 10 + "\U0001f600"),
    "one wide character as it is": json.dumps("a" * COUNT * 10 + "\U0001f600", ensure_ascii=False),
    "escapes": json.dumps('"' * COUNT * 10),
    "deep": "[" * 300 + "]" * 300,
    "tuples": _list('{"$":"tuple","value":[]}'),
    "deques": _list('{"$":"deque","value":[[],1]}'),
    "ordered": _list('{"$":"ordered_dict","value":{}}'),
    "paths": _list('{"$":"path","value":"#"}'),
    "times": _list('{"$":"timedelta","value":[1,2,3]}'),
    "a set": '{"$":"set","value":' + _list("1000#") + "}",
    "a mapping": '{"$":"dict","value":' + _list("[1000#,1]") + "}",
    "an ordered mapping": '{"$":"ordered_dict","value":{' + _list('"#":1')[1:-1] + "}}",
    "bytes": json.dumps({"$": "bytes", "value": "A" * 40 * COUNT}),
    "an array": json.dumps(
        {
            "$": "numpy.ndarray",
            "value": {"dtype": "|u1", "shape": [COUNT * 30], "data": "A" * 40 * COUNT},
        }
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_values_take_no_more_than_was_counted(name: str) -> None:
    text = bytearray(TEXTS[name].encode())
    json.loads(text)  # what is made once is made
    CODECS.decode(json.loads(text), {})
    counted = cost_of(text, decoded=True)
    tracemalloc.start()
    try:
        tree = parse_json(text)
        parsed = tracemalloc.get_traced_memory()[1]
        CODECS.decode(tree, {})
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Besides, objects of a few bytes; and where it is deep, the place of each level.
    more = 200_000 if name == "deep" else 10_000
    assert parsed <= cost_of(TEXTS[name].encode()) + more
    assert whole <= counted + more


def test_a_text_that_expands_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "ROOM", 1000)
    assert parse_json(b"[1,2,3]") == [1, 2, 3]
    with pytest.raises(
        TooMuchError, match=r"might take \d+ bytes of memory, more than the 1\d\d\d"
    ):
        parse_json(_list("[]").encode())
    assert len(parse_json(_list("[]").encode(), others=10_000_000)) == COUNT


def test_names_are_there_once_and_numbers_are_numbers() -> None:
    for text in (b'{"a":1,"a":2}', b"[NaN]", b"[Infinity]"):
        with pytest.raises(ValueError, match=r"twice|is not JSON"):
            parse_json(text)


def test_what_nobody_would_read_is_refused_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = DirectoryCheckpointIO()
    monkeypatch.setattr(jsontext, "ROOM", 130_000)
    io.save({"numbers": list(range(100))}, str(tmp_path / "some"))
    assert io.load(str(tmp_path / "some")) == {"numbers": list(range(100))}
    with pytest.raises(CheckpointError, match="nobody would read them"):
        io.save({"numbers": list(range(5000))}, str(tmp_path / "many"))
    with pytest.raises(CheckpointError, match=r"60 tensors, .* read its manifest"):
        io.save({f"w{n}": torch.ones(1) for n in range(60)}, str(tmp_path / "manifest"))
    assert [each.name for each in tmp_path.iterdir()] == ["some"]


def test_a_place_that_is_too_long_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="4096 are the most"):
        DirectoryCheckpointIO().save({"a" * 5000: 1}, str(tmp_path / "x"))
