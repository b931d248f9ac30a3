"""The outside of the package: lazy names, what an import loads, and which names do not occur."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import drivetrain_interfaces
import pytest

import drivetrain
import drivetrain.callbacks
import drivetrain.loggers

LAZY = [drivetrain, drivetrain.callbacks, drivetrain.loggers]
NEUTRAL = [drivetrain, drivetrain_interfaces]
VENDORS = re.compile("cuda|xla|hpu|ipu|habana|poptorch|deepspeed|horovod", re.IGNORECASE)
TABLE = "names.json"


def folder(module):
    return Path(module.__file__).parent


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_type_checkers_see_the_same_names_as_the_interpreter(module):
    source = Path(module.__file__).read_text(encoding="utf-8")
    imports = re.findall(r"^    from (\S+) import (\S+) as (\S+)$", source, re.MULTILINE)
    assert sorted(name for _, name, _ in imports) == module.__all__ == dir(module)
    for home, name, public in imports:
        assert name == public
        assert home == f"{module.__name__}.{module._HOME[name]}"


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_every_lazy_name_is_the_object_that_its_module_defines(module):
    for name, home in module._HOME.items():
        found = getattr(module, name)
        assert found.__module__ == f"{module.__name__}.{home}"
        assert found is getattr(importlib.import_module(found.__module__), name)


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Nope'"):
        _ = module.Nope


@pytest.mark.parametrize("name", ["drivetrain", "drivetrain.callbacks", "drivetrain.loggers"])
def test_importing_a_package_loads_no_torch(name):
    code = f"import {name}, sys; assert not {{'torch', 'numpy', 'rich'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


def test_importing_every_name_loads_no_backend_and_no_optional_package():
    names = ", ".join(drivetrain.__all__)
    code = (
        f"from drivetrain import {names}\nimport sys\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "others = {n for n in loaded if n.startswith('drivetrain_')} - {'drivetrain_interfaces'}\n"
        "assert not others, others\n"
        "assert not loaded & {'rich', 'jsonargparse', 'tensorboard', 'torchmetrics'}, loaded\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=100)


@pytest.mark.parametrize("module", NEUTRAL, ids=lambda module: module.__name__)
def test_no_vendor_is_named_but_in_the_table_of_names_and_the_short_form(module):
    found = []
    for path in sorted(folder(module).rglob("*")):
        if path.suffix not in {".py", ".json", ".toml", ".yaml", ".md"} or path.name == TABLE:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if VENDORS.search(line) and not re.search(r"\bgpus\b", line):
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert found == []


def test_there_is_one_table_of_names():
    tables = [path for module in NEUTRAL for path in folder(module).rglob(TABLE)]
    assert tables == [folder(drivetrain) / TABLE]
    assert VENDORS.search(tables[0].read_text(encoding="utf-8"))
