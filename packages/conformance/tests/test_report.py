"""The report: its schema describes it, and outcomes are what pytest reported."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import pytest
from drivetrain_interfaces import (
    CONTRACT,
    BackendSpec,
    Capabilities,
    DeviceFacts,
    Feature,
    Probe,
    StrategySpec,
)

from drivetrain_conformance.options import Options
from drivetrain_conformance.outcomes import Outcome, Tally, TestRecord
from drivetrain_conformance.report import SCHEMA, build_report, write_report
from drivetrain_conformance.run import ConformanceRun
from drivetrain_conformance.target import Found, Target

KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def faults(value, schema, root, where="report"):
    """What of JSON Schema this schema uses, and nothing else; lists what breaks it."""
    schema = dict(schema)
    if "$ref" in schema:
        return faults(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    kinds = schema.pop("type", None)
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        good = any(
            isinstance(value, KINDS[k]) and (k == "boolean" or not isinstance(value, bool))
            for k in kinds
        )
        if not good:
            return [f"{where} is a {type(value).__name__}, not {kinds}"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{where} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}, none of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where} is {value!r}, not {schema['pattern']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{where} is below {schema['minimum']}")
    if "maximum" in schema and value > schema["maximum"]:
        found.append(f"{where} is above {schema['maximum']}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            found += faults(item, schema.get("items", {}), root, f"{where}[{number}]")
    if isinstance(value, dict):
        found += [f"{where} lacks {key}" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            found += faults(key, schema.get("propertyNames", {}), root, f"the key {key} of {where}")
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            if inner is False:
                found.append(f"{where} has {key}")
            else:
                found += faults(item, inner, root, f"{where}.{key}")
    return found


def a_spec(**changes):
    facts = DeviceFacts("fake", "fakecl", "fake")
    capabilities = Capabilities(frozenset({Feature.CLOSURE}), frozenset({"32-true"}))
    values = {
        "name": "fake",
        "contract": CONTRACT,
        "capabilities": capabilities,
        "facts": facts,
        "strategies": ("single_device",),
        "probe": Probe,
        "load": lambda: None,
    }
    return BackendSpec(**{**values, **changes})


def a_strategy():
    return StrategySpec(
        "engine", CONTRACT, frozenset({"fake"}), a_spec().capabilities, lambda: None
    )


@pytest.fixture
def run():
    config = SimpleNamespace(option=SimpleNamespace(collectonly=False), args=[])
    target = Target(Found(a_spec(), "fake:spec", "fake 1.0", "fake", "fake"))
    made = ConformanceRun(config, Options("fake", level=1), target, ())
    made.tally.records = {
        "test_a": TestRecord("test_a", 0, ("B1",), Outcome.PASSED, seconds=0.5),
        "test_b[x]": TestRecord("test_b[x]", 1, ("S1", "S2"), Outcome.FAILED, "why", 1.25),
        "test_c": TestRecord("test_c", 1, ("S3",), Outcome.SKIPPED_BY_DECLARATION, "no"),
    }
    return made


SCHEMA_CONTENT = json.loads(SCHEMA.read_text("utf-8"))


def check(report):
    """By our own check, and by jsonschema's where it is installed."""
    report = json.loads(json.dumps(report))
    assert faults(report, SCHEMA_CONTENT, SCHEMA_CONTENT) == []
    try:
        import jsonschema
    except ImportError:
        return
    jsonschema.validate(report, SCHEMA_CONTENT)


def test_a_report_is_what_its_schema_says(run):
    check(build_report(run))


def test_a_report_of_a_strategy_is_what_its_schema_says(run):
    found = Found(a_strategy(), "engine:spec", "engine 2.0", "engine", "engine")
    run.target = Target(run.target.backend, found, "engine")
    report = build_report(run)
    check(report)
    assert report["strategy"]["device_types"] == ["fake"]


def test_a_report_of_one_of_the_backends_strategies_is_too(run):
    run.target = Target(run.target.backend, None, "single_device")
    report = build_report(run)
    check(report)
    assert report["strategy"]["name"] == "single_device"
    assert report["strategy"]["capabilities"] == report["backend"]["capabilities"]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("counts"),
        lambda r: r.update(verdict="splendid"),
        lambda r: r.update(extra=1),
        lambda r: r.update(level=4),
        lambda r: r["tests"][0].update(outcome="nearly"),
        lambda r: r["tests"][0].update(rules=["rule one"]),
        lambda r: r["backend"].update(registered="yes"),
        lambda r: r["levels"].update({"7": r["counts"]}),
        lambda r: r["counts"].update(passed=-1),
        lambda r: r["environment"]["packages"].update(torch=2),
        lambda r: r.update(schema=2),
    ],
)
def test_the_schema_refuses_what_is_none(run, change):
    report = copy.deepcopy(build_report(run))
    change(report)
    assert faults(report, SCHEMA_CONTENT, SCHEMA_CONTENT) != []


def test_tests_are_counted_by_level_and_outcome(run):
    report = build_report(run)
    assert report["counts"]["collected"] == 3
    assert report["counts"]["passed"] == 1
    assert report["levels"]["1"]["failed"] == 1
    assert report["levels"]["1"]["skipped_by_declaration"] == 1
    assert report["levels"]["0"]["collected"] == 1


def test_a_report_is_written_with_the_folders_that_lead_to_it(run, tmp_path):
    path = tmp_path / "build" / "deep" / "report.json"
    write_report(path, build_report(run))
    assert json.loads(path.read_text("utf-8"))["backend"]["name"] == "fake"


def phase(when="call", outcome="passed", longrepr=None, **more):
    report = SimpleNamespace(
        when=when, outcome=outcome, duration=0.25, longrepr=longrepr, longreprtext=str(longrepr)
    )
    report.passed = outcome == "passed"
    report.failed = outcome == "failed"
    vars(report).update(more)
    return report


def ended(*phases):
    record = TestRecord("test_x", 0)
    for each in phases:
        record.add(each)
    return record


def test_a_test_that_passed_has_passed_in_all_phases():
    record = ended(phase("setup"), phase(), phase("teardown"))
    assert (record.outcome, record.seconds) == (Outcome.PASSED, 0.75)


def test_a_test_whose_teardown_fails_has_failed():
    record = ended(phase("setup"), phase(), phase("teardown", "failed", "E   it leaks"))
    assert record.outcome is Outcome.FAILED
    assert "it leaks" in record.reason


def test_a_test_whose_setup_fails_has_failed():
    assert ended(phase("setup", "failed", "E"), phase("teardown")).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("text", "outcome", "reason"),
    [
        (
            "Skipped: by declaration: x is not declared",
            Outcome.SKIPPED_BY_DECLARATION,
            "x is not declared",
        ),
        ("Skipped: on this machine: no device", Outcome.SKIPPED_BY_MACHINE, "no device"),
        ("Skipped: I felt like it", Outcome.SKIPPED, "I felt like it"),
    ],
)
def test_skips_are_told_apart(text, outcome, reason):
    record = ended(phase("setup", "skipped", ("file", 1, text)), phase("teardown"))
    assert (record.outcome, record.reason) == (outcome, reason)


def test_an_expected_failure_is_no_skip():
    record = ended(phase("setup"), phase("call", "skipped", "E", wasxfail="reason: known"))
    assert (record.outcome, record.reason) == (Outcome.EXPECTED_FAILURE, "known")


def test_a_test_that_never_ran_is_not_run():
    assert Tally({"test_x": TestRecord("test_x", 0)}).counts()["not_run"] == 1
