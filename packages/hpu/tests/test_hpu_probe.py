"""What the probe says on machines of all kinds. It never raises and opens nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_hpu import spec, telemetry
from drivetrain_hpu.probing import Installation, Kernel, ask_bridge, kernel, look

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(400)
INTELS = Installation(True, "1.24.1.77", "2.11.0a0+git1234567")
LOADED = Kernel(driver=True, nodes=2)
TWO = (telemetry.Card(0, "HL-225", busy=False), telemetry.Card(1, "HL-225", busy=False))


def cards(*found: telemetry.Card) -> Callable[[], tuple[telemetry.Card, ...]]:
    return lambda: found


def silent() -> tuple[telemetry.Card, ...]:
    raise telemetry.NoAnswer("pyhlml is not installed")


def never(_: Any) -> int | str:
    raise AssertionError("nobody had to ask")


def test_a_machine_with_two_modules_is_found_by_name() -> None:
    found = look({}, INTELS, LOADED, cards(*TWO), never)
    assert found.devices == 2
    assert found.names == ("HL-225 module 0", "HL-225 module 1")


@pytest.mark.parametrize(
    ("env", "installed", "system", "driver", "answer", "words"),
    [
        ({}, Installation(False, "", "2.11"), LOADED, cards(*TWO), 1, ["not installed", "Install"]),
        ({}, Installation(True, "1.24.1", ""), LOADED, cards(*TWO), 1, ["torch is not installed"]),
        (
            {},
            Installation(True, "1.23.0.1", "2.11.0a0+git1"),
            LOADED,
            cards(*TWO),
            1,
            ["1.23.0.1 is built for torch 2.9", "2.11.0a0+git1 is installed"],
        ),
        (
            {},
            Installation(True, "1.24.1", "2.11.0"),
            LOADED,
            cards(*TWO),
            1,
            ["names no build", "AttributeError"],
        ),
        (
            {"PT_HPU_LAZY_MODE": "1"},
            Installation(True, "1.24.1", "2.11.0+cpu"),
            LOADED,
            cards(*TWO),
            1,
            ["not Intel's build", "PT_HPU_LAZY_MODE=0"],
        ),
        ({}, INTELS, Kernel(False, 0), silent, 1, ["no sign of the Gaudi driver", "habanalabs"]),
        ({}, INTELS, Kernel(True, 0), silent, 1, ["driver is loaded", "no device node"]),
        ({}, INTELS, LOADED, silent, 0, ["2 Gaudi device nodes", "sees none"]),
        ({}, INTELS, LOADED, silent, "OSError: libSynapse.so", ["OSError: libSynapse.so"]),
        ({}, INTELS, LOADED, cards(), 1, ["lists no Gaudi module"]),
        (
            {"HABANA_VISIBLE_MODULES": "6"},
            INTELS,
            LOADED,
            cards(*TWO),
            1,
            ["HABANA_VISIBLE_MODULES='6' names none of the modules 0, 1"],
        ),
        (
            {"HABANA_VISIBLE_MODULES": "all"},
            INTELS,
            LOADED,
            cards(*TWO),
            1,
            ["HABANA_VISIBLE_MODULES='all'", "no list"],
        ),
        (
            {},
            INTELS,
            LOADED,
            cards(telemetry.Card(0, "HL-225", busy=True)),
            1,
            ["busy", "hl-smi"],
        ),
        (
            {},
            Installation(True, "2.0.0", "2.30.0a0+git1"),
            LOADED,
            cards(*TWO),
            "AssertionError: torch 2.29 is needed",
            ["another process", "AssertionError: torch 2.29 is needed", "one release"],
        ),
    ],
)
def test_each_fault_is_named_with_what_to_do(
    env: dict[str, str],
    installed: Installation,
    system: Kernel,
    driver: Any,
    answer: int | str,
    words: list[str],
) -> None:
    found = look(env, installed, system, driver, lambda _: answer)
    assert found.devices == 0
    for word in words:
        assert word in found.reason
    assert ". " in found.reason  # what is wrong, and what to do


def test_one_free_module_of_two_is_enough() -> None:
    busy = telemetry.Card(0, "HL-225", busy=True)
    assert look({}, INTELS, LOADED, cards(busy, TWO[1]), never).devices == 2


def test_visible_modules_are_counted_in_their_order() -> None:
    found = look({"HABANA_VISIBLE_MODULES": "1,0"}, INTELS, LOADED, cards(*TWO), never)
    assert found.names == ("HL-225 module 1", "HL-225 module 0")


def test_nodes_and_driver_are_looked_for(tmp_path: Path) -> None:
    for name in ("accel0", "accel1", "accel_controlD0"):
        (tmp_path / name).touch()
    found = kernel(tmp_path, ((str(tmp_path), "accel[0-9]*"), (str(tmp_path / "none"), "hl*")))
    assert found == Kernel(driver=True, nodes=2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("assertion", "AssertionError: torch 2.11 is needed"), ("attribute", "AttributeError: 'None")],
)
def test_a_broken_import_is_a_reason_and_no_exception(
    gaudi: Callable[..., None], fault: str, words: str
) -> None:
    import os

    gaudi(fault=fault)
    answer = ask_bridge(dict(os.environ))
    assert isinstance(answer, str)
    assert words in answer


def test_a_driver_that_does_not_answer_is_no_exception(gaudi: Callable[..., None]) -> None:
    gaudi(no_driver=True)
    with pytest.raises(telemetry.NoAnswer, match="Driver not loaded"):
        telemetry.ask()


def test_without_the_software_the_probe_says_so(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    script = (
        "import sys; from drivetrain_hpu import spec; found = spec.probe(); "
        "assert found.devices == 0; print(found.reason); assert 'torch' not in sys.modules"
    )
    assert "Gaudi software is not installed" in run_python(script, PYTHONPATH="").stdout


def test_probing_opens_no_module_and_loads_no_bridge(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    script = (
        "import sys, fake_gaudi; from drivetrain_hpu import spec; found = spec.probe(); "
        "assert found.devices == 4, found; assert fake_gaudi.Held.module is None; "
        "assert 'habana_frameworks.torch' not in sys.modules; assert 'torch' not in sys.modules"
    )
    run_python(script)


def test_a_held_module_is_busy_and_a_free_one_is_not(gaudi: Callable[..., None]) -> None:
    import fake_gaudi

    gaudi(cards=2)
    file = fake_gaudi.try_lock("1")
    try:
        assert [card.busy for card in telemetry.ask()] == [False, True]
    finally:
        file.close()


def test_the_spec_names_strategies_that_exist() -> None:
    from drivetrain_hpu.strategies import STRATEGIES

    assert set(spec.strategies) == set(STRATEGIES)
