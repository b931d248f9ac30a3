"""Every gate passes a sound tree, and notices the one thing that is broken in it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import gates
import golden
import links
import pytest
import untested

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ERRORS = """
class DrivetrainError(Exception):
    code: ClassVar[str] = "DT000"

class OddError(DrivetrainError):
    code = "DT101"

    @classmethod
    def named(cls, name):
        return cls(f"Odd is {name!r}.", "Even it.")
"""
PAGE = "# DT101\n`OddError`\n## What it means\n## Example\nOdd. [DT101]\n## What to do\n"
PROJECT = """
[project]
name = "{distribution}"
version = "1.3.0.dev0"
dependencies = ["drivetrain-interfaces>=1.3,<2"]
{points}
[tool.drivetrain]
owners = ["a"]
state = "stable"
[tool.ruff]
extend = "../../pyproject.toml"
"""


SUITE = '''
def test_odd():
    """Odd.

    R: O1
    """
'''


def _mutant(rule: str, test: str) -> str:
    return f'[[mutant]]\nname = "even"\nrules = ["{rule}"]\ncaught_by = ["{test}"]\n'


def _write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository that breaks no rule."""
    names = {
        "interfaces": "drivetrain-interfaces",
        "trainer": "drivetrain",
        "npu": "drivetrain-npu",
    }
    for name, distribution in names.items():
        module = distribution.replace("-", "_")
        folder = tmp_path / "packages" / name
        points = (
            '[project.entry-points."drivetrain.backends"]\nnpu = "x:y"' if name == "npu" else ""
        )
        _write(folder / "pyproject.toml", PROJECT.format(distribution=distribution, points=points))
        for file in ("README.md", "CHANGELOG.md", f"src/{module}/__init__.py", "tests/test_x.py"):
            _write(folder / file)
        _write(folder / f"src/{module}/py.typed")
        _write(folder / "LICENSE", "Free.")
        _write(folder / "changes/1.feature.md", "New.")
    packages = tmp_path / "packages"
    _write(packages / "npu/src/drivetrain_npu/__init__.py", "contract = ContractVersion(1, 3)\n")
    _write(packages / "interfaces/src/drivetrain_interfaces/errors.py", ERRORS)
    _write(
        packages / "interfaces/src/drivetrain_interfaces/contract.py",
        "CONTRACT = ContractVersion(1, 3)\n",
    )
    _write(packages / "trainer/src/drivetrain/names.json", '{"cuda": "drivetrain-cuda"}')
    _write(packages / "trainer/src/drivetrain/trainer.py", "gpus = 'cuda'\n")
    _write(tmp_path / "LICENSE", "Free.")
    _write(tmp_path / "README.md", "".join(f"[x](packages/{n}/README.md)\n" for n in names))
    modules = [distribution.replace("-", "_") for distribution in names.values()]
    _write(tmp_path / "pyproject.toml", f"[tool.importlinter]\nroot_packages = {modules}\n")
    _write(tmp_path / "ci/budgets.toml", "[lines]\ndefault = 20\n")
    _write(tmp_path / "docs/errors/DT101.md", PAGE)
    _write(tmp_path / "ci/messages/DT101.txt")
    _update_messages(tmp_path)
    _write(tmp_path / "docs/contracts/odd.md", "# Odd\n\n- **O1** Be odd.\n- **O2** Stay so.\n")
    _write(tmp_path / untested.SUITE / "level0/test_odd.py", SUITE)
    _write(tmp_path / untested.MUTANTS, _mutant("O1", "test_odd"))
    _write(tmp_path / "docs/index.md", "## Bringing hardware\n")
    found, _, mutants = untested.survey(tmp_path)
    _write(tmp_path / untested.PAGE, untested.page(found, mutants))
    return tmp_path


def _update_messages(root: Path) -> None:
    for code, lines in golden.written(root).items():
        path = root / f"ci/messages/{code}.txt"
        current = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(golden.expected(code, lines, current), encoding="utf-8")


def _all(root: Path) -> list[str]:
    return [fault for gate in gates.GATES for fault in gate(root)]


def test_a_sound_tree_passes_every_gate(tree: Path) -> None:
    assert _all(tree) == []


NPU = "packages/npu"
SPEC = f"{NPU}/src/drivetrain_npu/__init__.py"
CORE = "packages/interfaces/src/drivetrain_interfaces"


@pytest.mark.parametrize(
    ("path", "text", "gate", "fault"),
    [
        (f"{NPU}/CHANGELOG.md", None, gates.same_outside, "has no CHANGELOG.md"),
        (f"{NPU}/src/drivetrain_npu/py.typed", None, gates.same_outside, "py.typed"),
        (f"{NPU}/tests/test_x.py", None, gates.same_outside, "holds no test"),
        (f"{NPU}/LICENSE", "Mine.", gates.same_outside, "LICENSE differs"),
        ("packages/trainer/src/drivetrain/loop.py", "if XLA: pass", gates.neutral_source, "XLA"),
        (f"{CORE}/devices.py", "# as cuda:1", gates.neutral_source, "devices.py:1 names 'cuda'"),
        ("docs/errors/DT101.md", None, gates.error_pages, "docs/errors has nothing on DT101"),
        ("docs/errors/DT999.md", PAGE, gates.error_pages, "DT999, which no error uses"),
        ("docs/errors/DT101.md", "# DT101", gates.error_pages, "has no '## What it means'"),
        (f"{CORE}/more.py", ERRORS.replace("Odd", "Sad"), gates.error_pages, "DT101 belongs to"),
        (f"{CORE}/errors.py", ERRORS.replace("Even", "Odd"), gates.error_pages, "DT101.txt is not"),
        ("ci/messages/DT500.txt", "x", gates.error_pages, "belongs to no error"),
        (SPEC, "ContractVersion(1, 2)", gates.contracts_agree, "written for contract 1.2"),
        (SPEC, "", gates.contracts_agree, "states no ContractVersion"),
        (f"{CORE}/contract.py", "C = ContractVersion(1, 4)", gates.contracts_agree, "CONTRACT is"),
        (SPEC, "x = 1\n" * 21, gates.modules_stay_short, "has 21 lines, 1 too many"),
        ("README.md", "", gates.everybody_is_listed, "does not link packages/npu"),
        (f"{NPU}/changes/2.fix.md", "x", gates.fragments, "2.fix.md is not named"),
        (f"{NPU}/changes/2.bugfix.md", " \n", gates.fragments, "is empty"),
        (untested.MUTANTS, _mutant("O1", "test_even"), gates.untested_rules, "no test of"),
        (untested.MUTANTS, _mutant("O2", "test_odd"), gates.untested_rules, "it cites that"),
        (untested.MUTANTS, _mutant("O9", "test_odd"), gates.untested_rules, "which is no rule"),
        ("docs/contracts/odd.md", "- **O1** Be odd.\n", gates.untested_rules, "--write"),
    ],
)  # fmt: skip
def test_a_gate_notices_what_is_broken(
    tree: Path, path: str, text: str | None, gate: Callable[[Path], Iterator[str]], fault: str
) -> None:
    if text is None:
        (tree / path).unlink()
    else:
        _write(tree / path, text)
    assert fault in "\n".join(gate(tree))


def test_a_package_outside_the_import_rules_is_noticed(tree: Path) -> None:
    settings = '[tool.importlinter]\nroot_packages = ["drivetrain", "drivetrain_interfaces"]\n'
    _write(tree / "pyproject.toml", settings)
    assert list(gates.everybody_is_listed(tree)) == [
        "packages/npu is not in root_packages of [tool.importlinter]"
    ]


def test_rendered_messages_survive_an_update_and_must_carry_their_code(tree: Path) -> None:
    path = tree / "ci/messages/DT101.txt"
    path.write_text("# as readers see them\nOdd is 3. Even it. [DT101]\n", encoding="utf-8")
    _update_messages(tree)
    text = path.read_text(encoding="utf-8")
    assert "Odd is 3. Even it. [DT101]" in text
    assert "interfaces: Odd is {name!r}. Even it." in text
    assert list(golden.faults(tree)) == []
    path.write_text(text.replace(" [DT101]", ""), encoding="utf-8")
    assert "without its code" in "\n".join(golden.faults(tree))


def _git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def test_a_change_of_source_needs_a_fragment(tree: Path) -> None:
    _git(tree, "init", "-q", "-b", "main")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-qm", "one")
    _write(tree / SPEC, "contract = ContractVersion(1, 3)  # changed\n")
    _git(tree, "commit", "-qam", "two")
    assert list(gates.changes_are_told(tree, "HEAD~1")) == [
        "packages/npu/src changed since HEAD~1, and packages/npu/changes tells nobody"
    ]
    _write(tree / f"{NPU}/changes/2.trivial.md", "A comment.")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-qm", "three")
    assert list(gates.changes_are_told(tree, "HEAD~2")) == []


def test_dead_links_and_anchors_are_found(tree: Path) -> None:
    _write(tree / "docs/a.md", "# One title\n[b](b.md) [c](../README.md#no) [d](#one-title)\n")
    assert links.dead(tree) == [
        "docs/a.md: b.md does not exist",
        "docs/a.md: ../README.md#no has no such heading",
    ]
