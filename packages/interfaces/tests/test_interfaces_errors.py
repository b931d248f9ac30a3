"""Errors: their text, their codes, and that they survive the way between processes."""

from __future__ import annotations

import copy
import pickle
import re
from typing import TYPE_CHECKING

import pytest

from drivetrain_interfaces import (
    ConfigurationError,
    ContractMismatchError,
    ContractVersion,
    DrivetrainError,
    NotFoundError,
    Probe,
    StepSpec,
    StorageError,
)
from drivetrain_interfaces import errors as module
from drivetrain_interfaces.devices import parse_devices
from drivetrain_interfaces.discovery import BACKENDS, Registration, registrations, take_inventory

if TYPE_CHECKING:
    from collections.abc import Callable

ERRORS = [
    value
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, DrivetrainError)
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_survives_pickling_and_copying(error: type[DrivetrainError]) -> None:
    raised = error("Rank 3 of 8 asked for 'x'; found 'y'.", "Use 'y'.")
    for again in (pickle.loads(pickle.dumps(raised)), copy.copy(raised)):
        assert type(again) is error
        assert again.args == raised.args == (raised.message, raised.hint)
        assert (again.message, again.hint) == (raised.message, raised.hint)
        assert str(again) == str(raised) == f"{raised.message} Use 'y'. [{error.code}]"


def test_codes_are_unique_and_well_formed() -> None:
    codes = [error.code for error in ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"DT\d{3}", code) for code in codes)


def test_an_error_without_a_hint_has_no_gap() -> None:
    assert str(DrivetrainError("No.")) == "No. [DT000]"


def test_users_can_catch_what_they_expect() -> None:
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(NotFoundError, LookupError)
    assert issubclass(ContractMismatchError, ImportError)
    assert issubclass(StorageError, OSError)


def _not_found() -> list[DrivetrainError]:
    known = ("cuda", "cpu")
    return [
        NotFoundError.named("accelerator", "cpuu", known),
        NotFoundError.named("accelerator", "npu", known),
        NotFoundError.named("accelerator", "npu", known, "drivetrain-npu"),
        NotFoundError.named("strategy", "ddp", ()),
    ]


def _mismatch() -> list[DrivetrainError]:
    old, new = ContractVersion(1, 0), ContractVersion(2, 0)
    return [
        ContractMismatchError.between("drivetrain-npu 1.2.3", old, new),
        ContractMismatchError.between("drivetrain-npu 3.0.0", new, old),
    ]


def _configuration() -> list[DrivetrainError]:
    raised: list[DrivetrainError] = []
    for request in (0, 3, "many", [0, 2], [0, 0], []):
        with pytest.raises(ConfigurationError) as caught:
            parse_devices(request, Probe(2), "npu")
        raised.append(caught.value)
    raised.append(
        ConfigurationError.conflicts(
            [
                ("devices=3 was asked for, and 2 were found.", "Ask for 1 or 2."),
                ("precision='8-true' is not known.", "Use '32-true'."),
            ]
        )
    )
    return raised


@pytest.mark.parametrize(
    ("code", "raised"),
    [("DT101", _not_found), ("DT103", _mismatch), ("DT201", _configuration)],
)
def test_messages_are_those_of_the_golden_file(
    code: str,
    raised: Callable[[], list[DrivetrainError]],
    golden: Callable[[str], list[str]],
) -> None:
    assert [str(error) for error in raised()] == golden(code)


def test_messages_about_broken_packages_are_those_of_the_golden_file(
    site, backend_module, golden: Callable[[str], list[str]]
) -> None:
    site.install("acme-wrong", BACKENDS, {"wrong": "collections:OrderedDict"}, "0.2")
    site.install("acme-raises", BACKENDS, {"raises": "no_such_module_at_all:spec"}, "0.3")
    probe = backend_module("probes", probe="raise OSError('driver is asleep')")
    site.install("acme-probes", BACKENDS, {"probes": probe}, "0.4")
    for number in (1, 2):
        site.install(f"acme-twin{number}", BACKENDS, {"twin": backend_module("twin")})
    inventory = take_inventory(backends=site.points(BACKENDS), strategies=[])
    assert [str(entry.problem) for entry in inventory.backends] == golden("DT104")


def test_a_setting_newer_than_the_backend_is_refused_as_in_the_golden_file(
    golden: Callable[[str], list[str]],
) -> None:
    from dataclasses import dataclass, field

    from drivetrain_interfaces import UnsupportedError
    from drivetrain_interfaces.strategy import refuse_what_is_newer

    @dataclass(frozen=True)
    class Newer(StepSpec):
        swap: bool = field(default=False, metadata={"since": ContractVersion(1, 4)})

    def made(*, swap: bool) -> Newer:
        return Newer(module=None, optimizers=(), loss=max, swap=swap)  # type: ignore[arg-type]

    refuse_what_is_newer(made(swap=False), "drivetrain-npu 1.2.3", ContractVersion(1, 3))
    refuse_what_is_newer(made(swap=True), "drivetrain-npu 1.4.0", ContractVersion(1, 4))
    with pytest.raises(UnsupportedError) as caught:
        refuse_what_is_newer(made(swap=True), "drivetrain-npu 1.2.3", ContractVersion(1, 3))
    assert [str(caught.value)] == golden("DT105")


def test_the_cause_of_a_broken_import_is_kept(site) -> None:
    site.install("acme-raises", BACKENDS, {"raises": "no_such_module_at_all:spec"})
    claim: Registration = registrations(BACKENDS, site.points(BACKENDS))["raises"][0]
    with pytest.raises(DrivetrainError) as caught:
        claim.load()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
