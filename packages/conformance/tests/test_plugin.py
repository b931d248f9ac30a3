"""The plugin: what is collected, what makes a conformance run, and which settings do not matter.

The backend under test is a fake without torch and without devices, so that a run takes a second.
"""

from __future__ import annotations

import json
import sys

import pytest

# Loaded here, so that runs inside this process, which forget what they loaded, share them.
from drivetrain_conformance import fixtures, run
from drivetrain_conformance.selection import functions

assert fixtures.RUN is run.RUN

pytest_plugins = ["pytester"]

FAKE = """
import dataclasses
from drivetrain_interfaces import *
from drivetrain_interfaces.errors import listed

FACTS = DeviceFacts("fake", "fakecl", "fake")
PRECISIONS = frozenset({"32-true"})


class Precision32:
    name = "32-true"
    policy = PrecisionPolicy()
    def convert(self, module): return module
    def forward(self): raise AssertionError
    def backward(self, loss): raise AssertionError
    def step(self, optimizers, prepare): raise AssertionError
    def state_dict(self): return {}
    def load_state_dict(self, state): pass


class FakeAccelerator:
    facts = FACTS
    device_type = "fake"
    def device_count(self): return 0
    def activate(self, index, local_size): raise UnavailableError("No device.", "Buy one.")
    def synchronize(self, device): pass
    def close(self): pass


class FakeCollectives:
    def all_reduce(self, tensor, op=ReduceOp.SUM): return tensor
    def all_gather(self, tensor): return [tensor]
    def broadcast(self, tensor, source=0): return tensor
    def broadcast_object(self, value, source=0): return value
    def barrier(self): pass


class FakeIO:
    def save(self, tree, path): pass
    def load(self, path): return {}
    def exists(self, path): return False
    def remove(self, path): pass


class FakeBackend:
    def accelerator(self): return FakeAccelerator()
    def precision(self, name):
        if name in PRECISIONS:
            return Precision32()
        raise UnsupportedError(f"Precision {name!r} was asked for.", f"Use {listed(PRECISIONS)}.")
    def collectives(self, world): return FakeCollectives()
    def strategy(self, name, context):
        raise UnsupportedError(f"Strategy {name!r} was asked for.", "Use single_device.")
    def launcher(self, name): return None
    def checkpoint_io(self): return FakeIO()


spec = BackendSpec(
    name="fake",
    contract=CONTRACT,
    capabilities=Capabilities(precisions=PRECISIONS),
    facts=FACTS,
    strategies=("single_device",),
    probe=lambda: Probe(0, "no fake device is installed, since there is none"),
    load=FakeBackend,
)
mute = dataclasses.replace(spec, probe=lambda: Probe(0))  # breaks B9: no reason
"""

BROKEN_TEST = "test_the_probe_is_complete"


@pytest.fixture
def kit(pytester, monkeypatch):
    """Runs level 0 of the suite on the fake; returns pytest's result and the report."""
    pytester.makepyfile(fake=FAKE)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run_kit(
        *arguments,
        backend="fake:spec",
        suite="drivetrain_conformance.suite",
        start=pytester.runpytest_inprocess,
    ):
        report = pytester.path / "reports" / "report.json"
        result = start(
            "--pyargs",
            suite,
            f"--drivetrain-backend={backend}",
            "--drivetrain-level=0",
            "--drivetrain-report=reports/report.json",
            "-p",
            "no:cacheprovider",
            *arguments,
        )
        content = json.loads(report.read_text("utf-8")) if report.exists() else None
        return result, content

    return run_kit


def xfails(pytester, test=BROKEN_TEST, until="2999-01-01"):
    pytester.path.joinpath("x.toml").write_text(
        f'[[xfail]]\ntest = "{test}"\nreason = "r"\nissue = "i-1"\nuntil = "{until}"\n', "utf-8"
    )
    return "--drivetrain-xfails=x.toml"


def outcomes(report):
    return {test["name"]: test["outcome"] for test in report["tests"]}


def test_a_whole_run_is_a_conformance_run(kit):
    result, report = kit()
    assert result.ret == 0
    result.stdout.fnmatch_lines(["fake: passed at level 0 of contract 0.1"])
    assert report["verdict"] == "passed"
    assert report["deviations"] == []
    assert report["counts"]["failed"] == report["counts"]["not_run"] == 0
    assert report["counts"]["skipped_by_machine"] > 0  # refusals of features need a device
    assert report["backend"]["owner"] == "fake (not installed)"
    assert not report["backend"]["registered"]


def test_level_0_needs_no_torch(kit, pytester):
    """A machine that only plans may lack it."""
    pytester.makepyfile(torch="raise ImportError('there is no torch here')")
    result, report = kit(start=pytester.runpytest_subprocess)
    assert result.ret == 0
    assert report["verdict"] == "passed"


def test_a_broken_rule_fails_the_run(kit):
    result, report = kit(backend="fake:mute")
    assert result.ret == 1
    assert report["verdict"] == "failed"
    assert [n for n, o in outcomes(report).items() if o == "failed"] == [BROKEN_TEST]
    result.stdout.fnmatch_lines(["*B9: with no device, the probe says why*"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["-k", "probe"],
        ["-m", "refuses"],
        ["--deselect", "level0/test_metadata.py::test_the_facts_are_complete"],
        ["--ignore-glob", "/*test_names.py"],
        ["--collect-only"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_run_that_leaves_tests_out_is_none(kit, arguments):
    result, report = kit(*arguments)
    result.stdout.fnmatch_lines(["This was not a conformance run:"])
    assert report["verdict"] == "not a conformance run"
    assert report["deviations"]


def test_a_run_that_stops_early_is_none(kit):
    _, report = kit("-x", backend="fake:mute")
    assert report["verdict"] == "not a conformance run"
    assert report["counts"]["not_run"] > 0


def test_a_part_of_the_suite_is_none(kit):
    result, report = kit(suite="drivetrain_conformance.suite.level0.test_metadata")
    assert result.ret == 0
    assert report["verdict"] == "not a conformance run"
    assert "were not collected" in report["deviations"][0]


def test_the_settings_of_the_vendors_repository_do_not_matter(kit, pytester):
    pytester.makeini(
        """
        [pytest]
        python_files = check_*.py
        python_functions = check_*
        python_classes = Check
        testpaths = nowhere
        addopts = --strict-markers --strict-config --import-mode=importlib
        xfail_strict = false
        filterwarnings = error
        empty_parameter_set_mark = fail_at_collect
        """
    )
    pytester.makeconftest("raise RuntimeError('the vendor\\'s own conftest')\n")
    pytester.mkdir("elsewhere")
    pytester.path.joinpath("conftest.py").rename(pytester.path / "elsewhere" / "conftest.py")
    result, report = kit(start=pytester.runpytest_subprocess)
    assert result.ret == 0
    assert report["verdict"] == "passed"


def test_it_runs_from_any_directory(kit, pytester, monkeypatch):
    folder = pytester.mkdir("deep")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    monkeypatch.chdir(folder)
    result = pytester.run(
        *(sys.executable, "-m", "pytest", "--pyargs", "drivetrain_conformance.suite"),
        *("--drivetrain-backend=fake:spec", "--drivetrain-level=0", "-p", "no:cacheprovider"),
        timeout=100,
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(["fake: passed at level 0 of contract 0.1"])


def test_an_expected_failure_is_counted_as_one(kit, pytester):
    result, report = kit(xfails(pytester), backend="fake:mute")
    assert result.ret == 0
    assert outcomes(report)[BROKEN_TEST] == "expected-failure"
    assert report["verdict"] == "passed"
    assert report["expectations"][0]["issue"] == "i-1"


def test_an_unexpected_pass_fails(kit, pytester):
    result, report = kit(xfails(pytester))
    assert result.ret == 1
    assert outcomes(report)[BROKEN_TEST] == "unexpected-pass"
    assert report["verdict"] == "failed"


@pytest.mark.parametrize(
    "name", ["test_no_such", BROKEN_TEST + "[x]", "test_an_undeclared_precision"]
)
def test_an_unknown_name_fails(kit, pytester, name):
    result, report = kit(xfails(pytester, test=name))
    assert result.ret == 1
    assert report["problems"] == [f"The expected failure {name!r} names no test."]


def test_a_name_of_a_level_that_does_not_run_is_left_alone(kit, pytester):
    result, report = kit(
        xfails(pytester, test="test_a_loss_curve_is_the_recorded_one[mlp-32-true]")
    )
    assert result.ret == 0
    assert report["problems"] == []


def test_an_entry_that_has_ended_fails(kit, pytester):
    result, report = kit(xfails(pytester, until="2020-01-01"), backend="fake:mute")
    assert result.ret == 1
    assert "ended on 2020-01-01" in report["problems"][0]
    assert outcomes(report)[BROKEN_TEST] == "failed"


def test_an_entry_that_has_ended_fails_also_if_the_test_passes(kit, pytester):
    result, report = kit(xfails(pytester, until="2020-01-01"))
    assert result.ret == 1
    assert outcomes(report)[BROKEN_TEST] == "passed"


def test_an_entry_for_what_is_not_declared_fails(kit, pytester):
    name = "test_an_undeclared_precision_is_refused[32-true]"
    result, report = kit(xfails(pytester, test=name))
    assert result.ret == 1
    assert "does not apply" in report["problems"][0]


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("nobody", "*No installed package registers 'nobody'*"),
        ("fake:absent", "*'fake:absent' could not be had*"),
        ("fake:FACTS", "*'fake:FACTS' is a DeviceFacts*BackendSpec*"),
        ("no_such_module:spec", "*ModuleNotFoundError*"),
    ],
)
def test_what_cannot_be_tested_is_said_at_once(kit, backend, says):
    result, _ = kit(backend=backend)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([says])


def test_a_bad_file_of_expectations_is_said_at_once(kit, pytester):
    pytester.path.joinpath("x.toml").write_text("[[xfail]]\ntest = 1\n", "utf-8")
    result, _ = kit("--drivetrain-xfails=x.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*x.toml, entry 1*"])


def test_the_suite_says_what_is_missing_without_a_backend(pytester):
    result = pytester.runpytest_subprocess("--pyargs", "drivetrain_conformance.suite", timeout=100)
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*Add --drivetrain-backend=NAME.*"])


def test_other_runs_of_pytest_are_left_alone(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_nothing_of_the_kit_is_loaded(request):
            assert "drivetrain_conformance.run" not in sys.modules
            assert "drivetrain_interfaces" not in sys.modules
            assert not request.config.pluginmanager.hasplugin("drivetrain-conformance-fixtures")
        """
    )
    result = pytester.runpytest_subprocess("--strict-markers", timeout=100)
    result.assert_outcomes(passed=1)
    assert "drivetrain conformance" not in result.stdout.str()


def test_names_of_tests_are_unique_and_every_test_cites_a_rule():
    """Expected failures and reports name tests by these names alone."""
    assert {function.level for function in functions().values()} == {0, 1, 2, 3}
    assert [function.name for function in functions().values() if not function.rules] == []
