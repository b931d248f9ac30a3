"""Discovery: one bad package costs one line, and nobody imports what was not asked for."""

from __future__ import annotations

import os
import sys
from importlib import metadata

import pytest

from drivetrain_interfaces import (
    BackendSpec,
    BrokenPackageError,
    ContractMismatchError,
    NotFoundError,
    Probe,
)
from drivetrain_interfaces.discovery import (
    BACKENDS,
    LAUNCHERS,
    STRATEGIES,
    load,
    load_backend,
    load_strategy,
    registrations,
    take_inventory,
)


@pytest.fixture
def good(site, backend_module) -> str:
    """A backend that works; every test below adds a bad one beside it."""
    value = backend_module("fine")
    site.install("acme-fine", BACKENDS, {"fine": value}, "2.0")
    return value


def _entries(site, only: str | None = None) -> dict:
    inventory = take_inventory(only, backends=site.points(BACKENDS), strategies=[])
    return {entry.name: entry for entry in inventory.backends}


def _assert_fine(entries: dict) -> None:
    assert entries["fine"].problem is None
    assert entries["fine"].probe == Probe(2)
    assert entries["fine"].owner == "acme-fine 2.0"


def test_a_working_backend_is_found_probed_and_named_with_its_owner(site, good) -> None:
    entries = _entries(site)
    _assert_fine(entries)
    assert entries["fine"].spec.name == "fine"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import a_vendor_library_that_is_missing", "ModuleNotFoundError"),
        ("raise OSError('libdriver.so.9: cannot open shared object file')", "libdriver.so.9"),
        ("spec = (", "SyntaxError"),
        ("", "AttributeError"),
    ],
    ids=["missing-dependency", "missing-library", "syntax", "missing-object"],
)
def test_a_broken_import_is_one_problem_that_names_the_package(
    site, good, source: str, cause: str
) -> None:
    """B12, B21"""
    site.install("acme-broken", BACKENDS, {"broken": f"{site.module(source)}:spec"}, "0.9")
    entries = _entries(site)
    _assert_fine(entries)
    problem = entries["broken"].problem
    assert isinstance(problem, BrokenPackageError)
    assert "acme-broken 0.9" in str(problem)
    assert cause in str(problem)
    assert problem.__cause__ is not None


def test_an_object_of_another_kind_is_one_problem(site, good) -> None:
    """B21"""
    site.install("acme-odd", BACKENDS, {"odd": f"{site.module('spec = 3')}:spec"})
    entries = _entries(site)
    _assert_fine(entries)
    assert isinstance(entries["odd"].problem, BrokenPackageError)
    assert "as a int, not as a BackendSpec" in str(entries["odd"].problem)


def test_a_name_claimed_twice_belongs_to_nobody(site, good, backend_module) -> None:
    """B21"""
    for owner in ("acme-left", "acme-right"):
        site.install(owner, BACKENDS, {"twin": backend_module("twin")})
    entries = _entries(site)
    _assert_fine(entries)
    problem = entries["twin"].problem
    assert isinstance(problem, BrokenPackageError)
    assert "acme-left 1.0" in str(problem)
    assert "acme-right 1.0" in str(problem)


@pytest.mark.parametrize("contract", [(0, 2), (1, 0), (9, 9)])
def test_a_newer_contract_is_one_problem_found_without_loading_the_vendor(
    site, good, backend_module, contract: tuple[int, int]
) -> None:
    """B11, B21"""
    value = backend_module("future", contract=contract, probe="raise SystemError")
    site.install("acme-future", BACKENDS, {"future": value}, "7.0")
    entries = _entries(site)
    _assert_fine(entries)
    problem = entries["future"].problem
    assert isinstance(problem, ContractMismatchError)
    assert "acme-future 7.0 was written for contract" in str(problem)
    assert entries["future"].probe is None


def test_a_probe_that_raises_is_one_problem_and_keeps_the_spec(site, good, backend_module) -> None:
    """B8, B21"""
    value = backend_module("shaky", probe="raise RuntimeError('no driver')")
    site.install("acme-shaky", BACKENDS, {"shaky": value})
    entries = _entries(site)
    _assert_fine(entries)
    assert isinstance(entries["shaky"].problem, BrokenPackageError)
    assert "its probe raised RuntimeError: no driver" in str(entries["shaky"].problem)
    assert entries["shaky"].spec is not None


def test_all_of_them_together_leave_the_good_one_working(site, good, backend_module) -> None:
    site.install("acme-a", BACKENDS, {"a": f"{site.module('1/0')}:spec"})
    site.install("acme-b", BACKENDS, {"b": backend_module("b", contract=(3, 0))})
    site.install("acme-c", BACKENDS, {"c": backend_module("c", probe="return 1/0")})
    entries = _entries(site)
    _assert_fine(entries)
    assert [name for name, entry in entries.items() if entry.problem] == ["a", "b", "c"]


def test_listing_imports_nothing(site, good) -> None:
    """B20"""
    module = good.partition(":")[0]
    assert set(registrations(BACKENDS, site.points(BACKENDS))) == {"fine"}
    assert module not in sys.modules


def test_naming_a_backend_imports_that_one_only(site, good, backend_module) -> None:
    """B20"""
    other = backend_module("other")
    site.install("acme-other", BACKENDS, {"other": other})
    entries = _entries(site, only="fine")
    _assert_fine(entries)
    assert entries["other"].spec is None
    assert entries["other"].problem is None
    assert other.partition(":")[0] not in sys.modules


def test_the_chosen_backend_is_read_from_what_is_installed(site, good) -> None:
    assert isinstance(load_backend("fine"), BackendSpec)


def test_an_unknown_name_lists_what_is_installed_and_what_to_install(site, good) -> None:
    with pytest.raises(NotFoundError, match=r"'npu' \(installed: .*fine.*Install drivetrain-npu"):
        load_backend("npu", package="drivetrain-npu")
    with pytest.raises(NotFoundError, match="Use 'fine', the nearest name"):
        load_backend("fin")
    with pytest.raises(NotFoundError, match="strategy 'zero9'"):
        load_strategy("zero9")


def test_a_strategy_package_that_is_broken_does_not_hide_the_others(site) -> None:
    source = (
        "from drivetrain_interfaces import Capabilities, ContractVersion, StrategySpec\n"
        "spec = StrategySpec('zero', ContractVersion(0, 1), frozenset({'cpu'}), Capabilities(),"
        " load=lambda: None)\n"
    )
    site.install("acme-zero", STRATEGIES, {"zero": f"{site.module(source)}:spec"})
    site.install("acme-bad", STRATEGIES, {"bad": "no_such_module_at_all:spec"})
    inventory = take_inventory(backends=[], strategies=site.points(STRATEGIES))
    bad, zero = inventory.strategies
    assert isinstance(bad.problem, BrokenPackageError)
    assert zero.problem is None
    assert zero.spec is not None
    assert zero.spec.device_types == {"cpu"}


def test_a_protocol_can_be_the_kind_that_is_checked(site) -> None:
    from drivetrain_interfaces import Launcher

    site.install("acme-launch", LAUNCHERS, {"rocket": f"{site.module('rocket = object()')}:rocket"})
    with pytest.raises(BrokenPackageError, match="as a object, not as a Launcher"):
        load(LAUNCHERS, "rocket", Launcher, what="launcher")


def test_what_is_installed_later_is_found_and_what_is_there_is_read_once(
    site, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(site.folder, (1, 1))  # an install may come within the same tick of the clock
    before = registrations(LAUNCHERS)
    with monkeypatch.context() as patched:
        patched.setattr(metadata.PathDistribution, "read_text", None)
        assert registrations(LAUNCHERS) == before
    site.install("later-package", LAUNCHERS, {"later": "nowhere:nothing"})
    assert set(registrations(LAUNCHERS)) == {*before, "later"}
