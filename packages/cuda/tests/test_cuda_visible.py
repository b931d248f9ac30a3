"""``CUDA_VISIBLE_DEVICES``: what the driver would make of it."""

from __future__ import annotations

import random

import pytest
import torch

from drivetrain_cuda.visible import Card, entries, visible

CARDS = tuple(
    Card(f"H100 {'ab'[number == 3]}"[:4], uuid)
    for number, uuid in enumerate(("GPU-8932f9", "GPU-8932aa", "GPU-c0ffee", "GPU-d00dfe"))
)
LETTERS = {f"H100 {card.uuid}": "0123"[number] for number, card in enumerate(CARDS)}


def seen(variable: str | None) -> str:
    """The visible cards as the numbers that they have in all."""
    return "".join(LETTERS[name] for name in visible(CARDS, variable).names)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "0123"),
        ("0", "0"),
        ("2,0", "20"),
        ("3,2,1,0", "3210"),
        ("", ""),
        (" ", ""),
        ("-1", ""),
        ("NoDevFiles", ""),
        ("none", ""),
        ("0,-1,2", "0"),
        ("0,9,2", "0"),
        ("9,0", ""),
        ("0,0", ""),
        ("1,2,1", ""),
        ("0, 1", "01"),
        ("1gpu2,2ampere", "12"),
        ("0,,1", "0"),
        (",0", ""),
        ("0,1,", "01"),
        ("+1", "1"),
        ("0x1", "0"),
        ("1e1", "1"),
        ("00,1", "01"),
        ("0,00", ""),
        ("GPU-c0ffee", "2"),
        ("GPU-c", "2"),
        ("GPU-d,GPU-c", "32"),
        ("GPU-8932", ""),
        ("GPU-8932f", "0"),
        ("GPU-c,GPU-8932,GPU-d", "2"),
        ("GPU-c,GPU-c", ""),
        ("GPU-c,GPU-c0", ""),
        ("GPU-c,0", "2"),
        ("0,GPU-c", "0"),
        ("gpu-c0ffee", ""),
        ("GPU-", ""),
        ("MIG-c0ffee", ""),
    ],
)
def test_a_variable_makes_these_devices_visible(variable: str | None, expected: str) -> None:
    assert seen(variable) == expected


@pytest.mark.parametrize(
    ("variable", "stopped", "why"),
    [
        ("0,9", "9", "there are 4 devices"),
        ("0,GPU-c", "GPU-c", "is no number"),
        ("GPU-8932", "GPU-8932", "begins the name of 2 devices"),
        ("GPU-ffff", "GPU-ffff", "begins the name of no devices"),
        ("GPU-c,1", "1", "begins otherwise"),
        ("1,1", "1", "twice"),
        ("", "", "it is empty"),
        ("none", "none", "'none' is no device"),
    ],
)
def test_where_reading_stops_is_told(variable: str, stopped: str, why: str) -> None:
    found = visible(CARDS, variable)
    assert found.stopped_at == stopped
    assert why in found.why


def test_everything_read_is_told_by_silence() -> None:
    assert visible(CARDS, "2,0").stopped_at is None
    assert visible(CARDS, "2,0").why == ""


def _random_variables() -> list[str]:
    rng = random.Random(11)
    parts = [
        "0",
        "1",
        "2",
        "3",
        "7",
        "-1",
        "+2",
        "",
        " 1",
        "x",
        "1x",
        "GPU-8932f9",
        "GPU-c",
        "GPU-",
    ]
    parts += [
        "GPU-8932",
        "GPU-d00dfe",
        "MIG-1",
        "MIG-2",
        "MIG-1",
        " ",
        "10",
    ]  # torch fails on "-", which means nothing
    return [",".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(3000)]


def test_entries_are_those_that_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in _random_variables():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert list(entries(variable)) == torch.cuda._parse_visible_devices(), variable


def test_names_mean_what_torch_takes_them_for(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = [card.uuid for card in CARDS]
    asked = [v for v in _random_variables() if v.startswith("GPU-")]
    assert len(asked) > 200
    for variable in asked:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        wanted = torch.cuda._transform_uuid_to_ordinals(torch.cuda._parse_visible_devices(), uuids)  # type: ignore[arg-type]
        assert seen(variable) == "".join(map(str, wanted)), variable


def test_uuids_are_told_only_if_it_is_known_which_number_they_have() -> None:
    """The driver's own order puts the fastest first, which NVML does not know."""
    mixed = (Card("T400", "GPU-1"), Card("A6000", "GPU-2"))
    assert visible(mixed, None).names == ("T400", "A6000")
    assert visible(mixed, None, "PCI_BUS_ID").names == ("T400 GPU-1", "A6000 GPU-2")
    assert visible(mixed, "GPU-2").names == ("A6000 GPU-2",)


MIG = (
    Card("A100", "GPU-a", partitioned=True, instances=("MIG-1", "MIG-2")),
    Card("A100", "GPU-b"),
)


@pytest.mark.parametrize("variable", [None, "0", "0,1", "1,0", "GPU-a", "MIG-1", "MIG-1,MIG-2"])
def test_a_process_sees_one_compute_instance_and_no_board_beside_it(variable: str | None) -> None:
    assert visible(MIG, variable).names == ("A100 MIG-1",)


def test_another_instance_can_be_asked_for() -> None:
    assert visible(MIG, "MIG-2").names == ("A100 MIG-2",)
    assert visible(MIG, "MIG-2,MIG-1").names == ("A100 MIG-2",)


def test_a_whole_board_beside_a_partitioned_one_can_be_asked_for() -> None:
    assert visible(MIG, "1").names == ("A100 GPU-b",)
    assert visible(MIG, "GPU-b").names == ("A100 GPU-b",)


def test_a_partitioned_board_without_instances_cannot_be_used() -> None:
    empty = (Card("A100", "GPU-a", partitioned=True),)
    assert visible(empty, None).names == ()
    assert "no compute instance" in visible(empty, None).why
    assert visible((*empty, Card("A100", "GPU-b")), None).names == ("A100 GPU-b",)
