"""A new backend package: what is rendered, what is refused, and that it works as it comes."""

from __future__ import annotations

import ast
import builtins
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from drivetrain_interfaces import CONTRACT, ConfigurationError, NotFoundError

from drivetrain_conformance import scaffold
from drivetrain_conformance.__main__ import main as run_module

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from pathlib import Path

BAD_NAMES = ("Acme", "2acme", "ac me", "acme-npu", "_acme", "acme__x", "import", "")
BAD_ANSWERS = {
    "colour": "red",
    "distribution": "vendor.drive",
    "device_type": 'acme"',
    "extension": "torch acme",
}


@pytest.fixture
def copier():
    """Skips where the extra is not installed, as it need not be."""
    return pytest.importorskip("copier")


@pytest.fixture
def package(copier, tmp_path):
    """The folder of a package that was rendered with the defaults."""
    return scaffold.new("acme", tmp_path)


def _names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_it_renders_a_package_with_the_names_that_every_backend_has(package):
    assert package.name == "drivetrain-acme"
    assert _names(package) == {
        ".github/workflows/kit.yml",
        ".gitignore",
        "README.md",
        "noxfile.py",
        "pyproject.toml",
        "src/drivetrain_acme/__init__.py",
        "src/drivetrain_acme/accelerator.py",
        "src/drivetrain_acme/backend.py",
        "src/drivetrain_acme/py.typed",
        "tests/conformance.toml",
        "tests/test_acme.py",
    }


def test_nothing_of_the_template_is_left_in_it(package):
    for name in _names(package):
        text = (package / name).read_text()
        assert "{%" not in text, name
        assert name == ".github/workflows/kit.yml" or "{{" not in text, name
        if name.endswith(".py"):
            ast.parse(text)


def test_the_contract_is_said_twice_and_agrees_with_the_kit(package):
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    needs = next(n for n in project["dependencies"] if n.startswith("drivetrain-interfaces"))
    assert re.search(r">=(\d+\.\d+)", needs).group(1) == str(CONTRACT)
    spec = (package / "src/drivetrain_acme/__init__.py").read_text()
    assert f"ContractVersion({CONTRACT.major}, {CONTRACT.minor})" in spec
    assert project["entry-points"]["drivetrain.backends"] == {"acme": "drivetrain_acme:spec"}


def test_answers_replace_the_defaults(copier, tmp_path):
    answers = {
        "distribution": "Vendor-Drive",
        "device_type": "privateuseone",
        "extension": "acmelib",
        "author": 'Acme "A" Corp',
    }
    folder = scaffold.new("acme_npu", tmp_path, answers)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert (folder.name, project["name"]) == ("Vendor-Drive", "Vendor-Drive")
    assert project["authors"] == [{"name": 'Acme "A" Corp'}]
    spec = (folder / "src/vendor_drive/__init__.py").read_text()
    assert 'device_type="privateuseone"' in spec
    assert 'find_spec("acmelib")' in spec
    assert "class AcmeNpuBackend:" in (folder / "src/vendor_drive/backend.py").read_text()


LOOK = """
import json, sys
from drivetrain_acme import probe, spec

found = probe()
print(json.dumps([found.devices, found.reason, "torch" in sys.modules]))
"""


def test_unedited_the_probe_says_what_is_missing_and_loads_no_torch(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'src')\n{LOOK}"],
        cwd=package,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == [
        0,
        "the module torch_acme is missing, which is to be installed first",
        False,
    ]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_part_of_a_module_is_refused(name, tmp_path):
    with pytest.raises(ConfigurationError, match=re.escape(repr(name))):
        scaffold.new(name, tmp_path)
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("question", BAD_ANSWERS)
def test_an_answer_that_cannot_be_used_is_refused(question, tmp_path):
    with pytest.raises(ConfigurationError, match=question):
        scaffold.new("acme", tmp_path, {question: BAD_ANSWERS[question]})
    assert _names(tmp_path) == set()


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    there = tmp_path / "drivetrain-acme"
    there.mkdir()
    (there / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is there already"):
        scaffold.new("acme", tmp_path)
    assert _names(tmp_path) == {"drivetrain-acme/mine.txt"}


def test_without_copier_it_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "copier":
            raise ModuleNotFoundError("No module named 'copier'", name="copier")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotFoundError, match=r"drivetrain-conformance\[scaffold\]"):
        scaffold.new("acme", tmp_path)
    assert _names(tmp_path) == set()


def test_the_command_says_where_the_package_is(copier, tmp_path, capsys):
    assert run_module(["new", "acme", "--into", str(tmp_path), "--author", "Me"]) == 0
    assert f"{tmp_path / 'drivetrain-acme'} is ready" in capsys.readouterr().out
    assert run_module(["new", "acme", "--into", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is there already" in err
    assert err.endswith("[DT201]\n")


def test_an_unknown_command_is_refused_with_the_usage(capsys):
    assert run_module(["old"]) == 2
    assert "new NAME" in capsys.readouterr().err
