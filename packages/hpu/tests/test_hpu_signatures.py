"""The fake has no name that the record lacks, and every signature is the recorded one."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import TYPE_CHECKING, Any

import pytest

from drivetrain_hpu.bridge import device_module, load_bridge

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

pytestmark = pytest.mark.timeout(400)
#: What the fake's modules hold besides: what torch itself looks for in a device's module.
TORCHS_OWN = {"_lazy_init", "_is_in_bad_fork"}
VENDORS = ("habana_frameworks.", "intel_transformer_engine", "pyhlml")


def shape(text: str) -> list[tuple[str, str, str]]:
    """Names, kinds and defaults of a signature's parameters, without annotations."""
    made: dict[str, Any] = {}
    header = text.replace("required", "'required'")
    exec(f"import pickle, datetime\ndef f{header}: ...", made)
    return parameters(made["f"])


def parameters(function: Any) -> list[tuple[str, str, str]]:
    found = inspect.signature(function).parameters.values()
    return [
        (one.name, one.kind.name, "" if one.default is one.empty else repr(one.default))
        for one in found
        if one.name != "self"
    ]


def lookup(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def compare(modules: dict[str, dict[str, str]]) -> int:
    """How many of the recorded names the fake has; each with the recorded signature."""
    load_bridge()
    seen = 0
    for module, names in modules.items():
        for name, text in names.items():
            try:
                mine = lookup(module, name)
            except ModuleNotFoundError:
                continue
            if mine is None or mine is importlib.import_module("torch").Stream:
                continue
            seen += 1
            if name in {"new_group", "device"}:
                assert [one[0] for one in parameters(mine)] == [one[0] for one in shape(text)]
                continue
            assert parameters(mine) == shape(text), f"{module}.{name}"
    return seen


def test_signatures_are_the_recorded_ones(record: dict[str, Any]) -> None:
    assert compare(record["modules"]) > 60


def test_the_fake_has_no_public_name_that_is_not_recorded(record: dict[str, Any]) -> None:
    load_bridge()
    for module, names in record["modules"].items():
        if not module.startswith(VENDORS):
            continue
        try:
            holder = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        mine = {
            name
            for name, value in vars(holder).items()
            if isinstance(value, (types.FunctionType, type))
            and value.__module__ == holder.__name__
            and not name.startswith("_")
        }
        known = {name.partition(".")[0] for name in names} | TORCHS_OWN
        assert mine - known - {"HLMLError", "synDeviceType"} == set(), module


def test_a_call_that_the_record_lacks_fails() -> None:
    load_bridge()
    import torch

    for name in ("empty_cache", "ipc_collect", "wrap_in_hpu_graph", "ModuleCacher"):
        with pytest.raises(AttributeError):
            getattr(device_module(), name)
    with pytest.raises(TypeError):
        device_module().synchronize("hpu:0")
    with pytest.raises(TypeError):
        device_module().set_rng_state_all(state=[])
    with pytest.raises(TypeError, match="device_id"):
        torch.distributed.init_process_group("hccl", device_id=torch.device("hpu"))
    with pytest.raises(TypeError, match="group_desc"):
        torch.distributed.new_group([0], group_desc="x")
    from habana_frameworks.torch import core

    with pytest.raises(TypeError):
        core.mark_step(wait=True)


def test_names_that_are_for_lazy_mode_are_there_in_it(
    run_python: Callable[..., subprocess.CompletedProcess[str]], record: dict[str, Any]
) -> None:
    script = (
        "import inspect, json, sys, pickle\n"
        "import habana_frameworks.torch as h, torch\n"
        "named = {'ModuleCacher': torch.hpu.ModuleCacher, 'torch.save': torch.save,\n"
        "         'torch.load': torch.load}\n"
        "print(json.dumps({k: [p.name for p in inspect.signature(v).parameters.values()]\n"
        "                  for k, v in named.items()}))\n"
    )
    import json

    found = json.loads(run_python(script, PT_HPU_LAZY_MODE="1").stdout.splitlines()[-1])
    lazy = record["lazy_only"]
    wanted = {
        "ModuleCacher": lazy["habana_frameworks.torch.hpu"]["ModuleCacher"],
        "torch.save": lazy["torch"]["save"],
        "torch.load": lazy["torch"]["load"],
    }
    for name, text in wanted.items():
        assert found[name] == [one[0] for one in shape(text)], name


def test_what_this_package_calls_is_recorded(record: dict[str, Any]) -> None:
    """Every name of the vendor's that the sources use is in the record."""
    import re
    from pathlib import Path

    import drivetrain_hpu

    known = {
        name.partition(".")[0]
        for part in ("modules", "lazy_only")
        for names in record[part].values()
        for name in names
    }
    folder = Path(drivetrain_hpu.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    used = set(
        re.findall(
            r"\b(?:torch\.hpu|hpu|device_module\(\)|pyhlml|hccl|core\(\))\.([A-Za-z_]+)\(", text
        )
    )
    assert len(used) > 12
    assert used - known == set()
