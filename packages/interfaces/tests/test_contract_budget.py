"""The contracts stay small, documented, and free of what a contract must not have."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

import drivetrain_interfaces
from drivetrain_interfaces import CONTRACT
from drivetrain_interfaces.errors import DrivetrainError

HOME = Path(drivetrain_interfaces.__file__).parent
MODULES = [import_module(f"drivetrain_interfaces.{m.name}") for m in iter_modules([str(HOME)])]
DUNDERS = {"__call__", "__enter__", "__exit__"}


def _protocols() -> list[type]:
    found = {
        value.__qualname__: value
        for module in MODULES
        for value in vars(module).values()
        if getattr(value, "_is_protocol", False) and value.__module__ == module.__name__
    }
    return [found[name] for name in sorted(found)]


def _members(contract: type) -> dict[str, Any]:
    own = {
        name: value
        for base in reversed(contract.__mro__)
        if getattr(base, "_is_protocol", False)
        for name, value in vars(base).items()
    }
    own |= dict.fromkeys(inspect.get_annotations(contract))
    return {name: v for name, v in own.items() if not name.startswith("_") or name in DUNDERS}


CONTRACTS = _protocols()


def test_all_contracts_of_the_design_are_found() -> None:
    names = {contract.__name__ for contract in CONTRACTS}
    assert names >= {
        "Accelerator", "Backend", "CheckpointIO", "ClusterEnvironment", "Collectives", "EvalStep",
        "Launcher", "ManualStep", "Precision", "Strategy", "TrainStep",
    }  # fmt: skip


def test_no_contract_has_more_members_than_the_budget(budgets: dict[str, Any]) -> None:
    table = {contract.__name__: sorted(_members(contract)) for contract in CONTRACTS}
    for name, members in table.items():
        print(f"{name:22} {len(members)}  {', '.join(members)}")  # shown when this fails
    most = budgets["contracts"]["members"]
    assert {name: m for name, m in table.items() if not 0 < len(m) <= most} == {}


def test_optional_abilities_have_one_or_two_members() -> None:
    optional = [c for c in CONTRACTS if c.__name__.startswith("Supports")]
    assert optional
    assert [c.__name__ for c in optional if len(_members(c)) > 2] == []


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_methods_are_documented_and_take_few_named_parameters(
    contract: type, budgets: dict[str, Any]
) -> None:
    assert contract.__doc__
    for name, member in _members(contract).items():
        function = member.fget if isinstance(member, property) else member
        if name not in {"__enter__", "__exit__"}:
            assert inspect.getdoc(function), f"{contract.__name__}.{name} has no docstring"
            assert not isinstance(member, property) or member.fset is None
        parameters = list(inspect.signature(function).parameters.values())[1:]
        assert len(parameters) <= budgets["contracts"]["parameters"]
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters), f"{name} takes **kwargs"


@pytest.mark.parametrize("path", sorted(HOME.glob("*.py")), ids=lambda path: path.name)
def test_no_module_is_longer_than_the_budget(path: Path, budgets: dict[str, Any]) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= budgets["lines"]["interfaces"]


def test_the_lazy_names_are_exactly_the_public_names_of_the_modules() -> None:
    for name in drivetrain_interfaces.__all__:
        home = drivetrain_interfaces._HOME[name]
        module = import_module(f"drivetrain_interfaces.{home}")
        assert getattr(drivetrain_interfaces, name) is getattr(module, name)
        value = getattr(module, name)
        if inspect.isclass(value):
            assert value.__module__ == module.__name__, f"{name} is listed under {home}"
    assert dir(drivetrain_interfaces) == drivetrain_interfaces.__all__


def test_type_checkers_see_the_same_names_as_the_interpreter() -> None:
    source = (HOME / "__init__.py").read_text(encoding="utf-8")
    imported = {
        line.split()[-1] for line in source.splitlines() if line.startswith("    from drivetrain_")
    }
    assert sorted(imported) == drivetrain_interfaces.__all__


def test_every_contract_and_every_error_is_exported() -> None:
    exported = set(drivetrain_interfaces.__all__)
    assert {contract.__name__ for contract in CONTRACTS} <= exported
    assert {error.__name__ for error in _errors()} <= exported


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Backends'"):
        _ = drivetrain_interfaces.Backends  # type: ignore[attr-defined]


def test_the_contract_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert version("drivetrain-interfaces").startswith(f"{CONTRACT}.")


def _errors() -> list[type[DrivetrainError]]:
    found: list[type[DrivetrainError]] = [DrivetrainError]
    for error in found:
        found += [e for e in error.__subclasses__() if e.__module__ == DrivetrainError.__module__]
    return found
