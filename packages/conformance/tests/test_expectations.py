"""The file of expected failures: what it may hold, and which entries name no test."""

from __future__ import annotations

import datetime as dt

import pytest

from drivetrain_conformance.expectations import (
    ExpectationsError,
    read_expectations,
    unknown_entries,
)

GOOD = """
[[xfail]]
test = "test_two_runs_are_equal_bit_for_bit[mlp-32-true]"
reason = "scatter adds in an order that differs between runs"
issue = "npu-118"
until = "2027-06-30"
"""


@pytest.fixture
def write(tmp_path):
    def write_one(text):
        path = tmp_path / "conformance.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_one


def test_an_entry_has_a_test_a_reason_an_issue_and_a_day(write):
    (entry,) = read_expectations(write(GOOD))
    assert entry.test == "test_two_runs_are_equal_bit_for_bit[mlp-32-true]"
    assert entry.function == "test_two_runs_are_equal_bit_for_bit"
    assert entry.issue == "npu-118"
    assert entry.until == dt.date(2027, 6, 30)


def test_a_day_may_be_toml_s_own(write):
    (entry,) = read_expectations(write(GOOD.replace('"2027-06-30"', "2027-06-30")))
    assert entry.until == dt.date(2027, 6, 30)


def test_an_entry_is_good_on_its_last_day_and_not_after(write):
    (entry,) = read_expectations(write(GOOD))
    assert not entry.expired(dt.date(2027, 6, 30))
    assert entry.expired(dt.date(2027, 7, 1))


def test_an_empty_file_expects_nothing(write):
    assert read_expectations(write("")) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD.replace('reason = "scatter adds in an order that differs between runs"', ""),
            "keys?|have|has",
        ),
        (GOOD + 'note = "x"', "note"),
        (GOOD.replace('"npu-118"', '""'), "issue"),
        (GOOD.replace('"npu-118"', "118"), "issue"),
        (GOOD.replace("2027-06-30", "next summer"), "next summer"),
        (GOOD.replace('"2027-06-30"', "2027-06-30T00:00:00"), "until"),
        (GOOD + GOOD, "twice"),
        ("[[skip]]\n" + GOOD, "skip"),
        ("xfail = 1", "xfail"),
        ("xfail = [1]", "entry 1"),
        ("[[xfail", "not TOML"),
    ],
)
def test_anything_else_is_refused_with_what_is_wrong(write, text, says):
    with pytest.raises(ExpectationsError, match=says):
        read_expectations(write(text))


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ExpectationsError, match="cannot be read"):
        read_expectations(tmp_path / "absent.toml")


def test_unknown_names_are_found_exactly(write):
    names = ["test_a[x]", "test_a[y]", "test_a", "test_b", "test_absent", "test_other_level[z]"]
    text = "".join(
        GOOD.replace("test_two_runs_are_equal_bit_for_bit[mlp-32-true]", n) for n in names
    )
    unknown = unknown_entries(
        read_expectations(write(text)),
        collected={"test_a[x]", "test_b"},
        known_functions={"test_a", "test_b", "test_other_level"},
    )
    assert [entry.test for entry in unknown] == ["test_a[y]", "test_a", "test_absent"]
